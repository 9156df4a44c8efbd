"""What mkdocs asks while it builds the site: pages that lie outside docs/.

Links in the repository lead from file to file, as people read them there. On the site docs/ is the
root, README.md is its first page, and the files below keep their paths.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = (
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "adapters/LICENCES.md",
    "bench/peers/README.md",
    "bench/paper/README.md",
    "bench/zoo/README.md",
    *(
        path.relative_to(ROOT).as_posix()
        for path in sorted(ROOT.glob("adapters/redmux_adapters/zoo/**/README.md"))
    ),
)
_LINK = re.compile(r"\[([^][]*)\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")
_ASSET = re.compile(
    r"<(?:script|link|img|iframe|source)\b[^>]*?\b(?:src|href)=[\"']?(?:https?:)?//[^>]*"
)


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages from outside docs/."""
    for path in OUTSIDE:
        files.append(File.generated(config, _on_site(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Makes links between files of the repository links between pages of the site."""
    path = page.file.src_uri
    here = _in_repository(path)

    def moved(link: re.Match[str]) -> str:
        text, path_there, anchor = link.groups("")
        target = posixpath.normpath(posixpath.join(posixpath.dirname(here), path_there))
        if text == path_there:  # a path says little on the site
            text = _title(ROOT / target)
        shown = posixpath.relpath(_on_site(target), posixpath.dirname(path) or ".")
        return f"[{text}]({shown}{anchor})"

    return _LINK.sub(moved, markdown)


def on_post_page(output: str, page: Any, **_: Any) -> None:
    """Refuses a page that fetches anything from another server."""
    if found := _ASSET.search(output):
        raise PluginError(f"{page.file.src_uri} fetches {found[0]}")


def _title(path: Path) -> str:
    return path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")


def _on_site(path: str) -> str:
    return "index.md" if path == "README.md" else path.removeprefix("docs/")


def _in_repository(path: str) -> str:
    if path == "index.md":
        return "README.md"
    return path if path in OUTSIDE else f"docs/{path}"
