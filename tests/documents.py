"""The pages that are written for people, and the blocks of code in them."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted(ROOT.glob("docs/*.md")),
    *(ROOT / package / "README.md" for package in ("client", "adapters", "server", "bench")),
]
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
_INDENTED = re.compile(r"(?<=\n\n)((?: {4}.*\n|\n(?= {4}))+)")


class Block(NamedTuple):
    """A block of code: its page, its language ("" for an indented one) and its text."""

    page: str
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}: {self.text.partition(chr(10))[0]}"


def blocks() -> Iterator[Block]:
    """Yields all blocks of all pages, as they come on a page: fenced ones first."""
    for path in PAGES:
        page = path.relative_to(ROOT).as_posix()
        text = path.read_text(encoding="utf-8")
        for language, block in _FENCED.findall(text):
            yield Block(page, language, block)
        for block in _INDENTED.findall(_FENCED.sub("", text)):
            yield Block(page, "", re.sub("^ {4}", "", block, flags=re.M))


def commands(block: Block) -> list[str]:
    """Returns the commands of a block of a shell; behind a `$` what follows is their output."""
    lines = re.sub(r" *\\\n *", " ", block.text).splitlines()
    shown = [line[2:] for line in lines if line.startswith("$ ")]
    return shown or [line for line in lines if line.strip() and not line.startswith("#")]


def anchors(path: Path) -> set[str]:
    """Returns the anchors of the headings of a page."""
    text = _FENCED.sub("", path.read_text(encoding="utf-8"))
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", text, re.M):
        name = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w -]", "", name).replace(" ", "-")
        number = 0
        while anchor in found:
            number += 1
            anchor = f"{anchor.removesuffix(f'-{number - 1}')}-{number}"
        found.add(anchor)
    return found
