"""Results as tables: plain ones on stdout, and Markdown."""

import itertools
from collections.abc import Iterable, Mapping, Sequence


def print_table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints rows under headings: the first column left, the others right, None as a dash."""
    table = [list(headings), *([_cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for first, *others in table:
        cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        print("  ".join((first.ljust(widths[0]), *cells)).rstrip(), flush=True)


def print_rows(rows: Iterable[Mapping[str, object]]) -> None:
    """Prints rows under their keys, a table for each run of rows that have the same ones."""
    for keys, same in itertools.groupby(rows, key=tuple):
        print_table(keys, [[str(value) for value in row.values()] for row in same])


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Returns a Markdown table whose columns but the first `left` are numbers."""
    rule = "|".join(["---"] * left + ["---:"] * (len(headings) - left))
    lines = (f"| {' | '.join(cells)} |" for cells in (headings, *rows))
    return "\n".join((next(lines), f"|{rule}|", *lines))


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
