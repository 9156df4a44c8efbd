"""How commands print: tables, fields, JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Prints rows of cells as columns; the first row is the heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for cells in rows:
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        print("  ".join(padded).rstrip())


def print_fields(fields: Mapping[str, object]) -> None:
    """Prints a line per field."""
    for name, value in fields.items():
        print(f"{name}: {value}")


def json_line(value: "DataclassInstance") -> str:
    """Returns a value as a JSON object in one line, with times in ISO 8601."""
    return json.dumps(asdict(value), default=datetime.isoformat)
