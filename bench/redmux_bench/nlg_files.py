"""Generated texts and their references in the plain files of the E2E NLG challenge."""

from collections.abc import Sequence
from pathlib import Path

from redmux import InvalidArgumentError


def read_hypotheses(path: str) -> Sequence[str]:
    """Returns the texts of a file, one a line; an empty line is a text of no words.

    Raises InvalidArgumentError for a file that cannot be read or holds no text.
    """
    lines = _lines(path)
    if not any(lines):
        raise InvalidArgumentError(f"{path} holds no text; write one generated text a line")
    return lines


def read_references(path: str, num_hypotheses: int) -> Sequence[Sequence[str]]:
    """Returns the references of each text: lines of a file, texts apart by an empty line.

    A file without any empty line has one reference a text. Raises InvalidArgumentError for a file
    that cannot be read, has a text without references, or has another number of texts.
    """
    lines = _lines(path)
    groups: list[list[str]]
    if "" in lines:
        groups = [[]]
        for number, line in enumerate(lines, 1):
            if line:
                groups[-1].append(line)
            elif groups[-1]:
                groups.append([])
            else:
                raise InvalidArgumentError(
                    f"{path}, line {number}: no reference before this empty line; every text has "
                    f"at least one, and one empty line stands between two texts"
                )
        if not groups[-1]:
            groups.pop()
    else:
        groups = [[line] for line in lines]
    if len(groups) != num_hypotheses:
        raise InvalidArgumentError(
            f"{path} has references of {len(groups)} texts, but there are {num_hypotheses} texts; "
            f"both files have to have the same texts in the same order"
        )
    return groups


def _lines(path: str) -> list[str]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as err:
        raise InvalidArgumentError(f"cannot read {path}: {err.strerror}") from None
    except UnicodeDecodeError as err:
        raise InvalidArgumentError(f"{path} is not UTF-8: bad byte at {err.start}") from None
    return [line.strip() for line in text.removesuffix("\n").split("\n")]
