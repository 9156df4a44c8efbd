"""Training data as it lies on disk: records with the place that each came from."""

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from redmux.errors import InvalidArgumentError

_MOST_SHOWN = 20


class Record(NamedTuple):
    """One line of data; `where` names its place in messages, as "file:line"."""

    where: str
    fields: Mapping[str, Any]


@dataclass
class Faults:
    """What is wrong with the data, collected so that all of it can be told at once."""

    found: list[tuple[str, str]] = field(default_factory=list)

    def add(self, where: str, message: str) -> None:
        """Notes a fault at a place."""
        self.found.append((where, message))

    def raise_any(self) -> None:
        """Raises InvalidArgumentError with the first faults and the number of all, if any.

        What several tasks found in data that they share is told once.
        """
        found = sorted(dict.fromkeys(self.found), key=lambda fault: _in_order_of_lines(fault[0]))
        if not found:
            return
        lines = [f"{where}: {message}" for where, message in found[:_MOST_SHOWN]]
        if len(found) > _MOST_SHOWN:
            lines.append(f"and {len(found) - _MOST_SHOWN} more")
        raise InvalidArgumentError(
            f"{len(found)} unusable record(s) in the training data:\n" + "\n".join(lines)
        )


def read_file(path: Path, faults: Faults) -> list[Record]:
    """Returns the records of a .jsonl, .json (one object a line, too) or .csv file.

    Lines that cannot be read go to `faults`. Raises InvalidArgumentError for other endings, for
    files that cannot be read and for what is one JSON array.
    """
    readers = {".jsonl": _from_jsonl, ".json": _from_jsonl, ".csv": _from_csv}
    if path.suffix not in readers:
        raise InvalidArgumentError(
            f"cannot tell the format of {str(path)!r}; give a .jsonl or .csv file"
        )
    try:
        return list(readers[path.suffix](path, faults))
    except OSError as err:
        raise InvalidArgumentError(f"cannot read {path}: {err.strerror}") from None


def renamed(source: str, records: list[Record], columns: Mapping[str, str]) -> list[Record]:
    """Returns the records with the names of `columns` in place of the source's own for them.

    Raises InvalidArgumentError for a column that no record has.
    """
    for name, column in columns.items():
        if records and not any(column in record.fields for record in records):
            raise InvalidArgumentError(
                f"{source} has no column {column!r} for {name}; it has "
                f"{', '.join(map(str, records[0].fields))}"
            )
    # A column that stands for one name is not seen under its own, which may mean something else.
    taken = set(columns.values())
    return [
        Record(
            record.where,
            {k: v for k, v in record.fields.items() if k not in taken}
            | {n: record.fields[c] for n, c in columns.items() if c in record.fields},
        )
        for record in records
    ]


def _in_order_of_lines(where: str) -> list[str | int]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", where)]


def read_lines(name: str, lines: Iterable[bytes], faults: Faults) -> Iterator[Record]:
    """Yields the records of a file of JSON objects, one a line; `name` is the file's, for places.

    Lines that cannot be read go to `faults`. Raises InvalidArgumentError for one JSON array.
    """
    for number, line in enumerate(lines, 1):
        where = f"{name}:{number}"
        if not line.strip():
            continue
        if number == 1 and line.strip() == b"[":
            raise InvalidArgumentError(
                f"{name} is one JSON array; write each of its objects on a line of its own"
            )
        try:
            value = json.loads(line)
            if b"\\u" in line:
                json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as err:
            half = err.object[err.start]
            faults.add(where, f"holds half of a character, \\u{ord(half):x}; write it as UTF-8")
        except UnicodeDecodeError as err:
            faults.add(where, f"not UTF-8 at byte {err.start}; convert the file")
        except (ValueError, RecursionError) as err:
            faults.add(where, f"not valid JSON: {err}")
        else:
            if isinstance(value, dict):
                yield Record(where, value)
            else:
                faults.add(where, "not a JSON object; each line has to be one")


def _from_jsonl(path: Path, faults: Faults) -> Iterator[Record]:
    with path.open("rb") as file:
        yield from read_lines(path.name, file, faults)


def _from_csv(path: Path, faults: Faults) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        header: Sequence[str] = ()
        start = 1
        try:
            for row in reader:
                where, start = f"{path.name}:{start}", reader.line_num + 1
                if not header:
                    header = row
                elif row and len(row) != len(header):
                    faults.add(where, f"{len(row)} columns, the header has {len(header)}")
                elif row:
                    yield Record(where, dict(zip(header, row, strict=True)))
        except (csv.Error, UnicodeDecodeError) as err:
            faults.add(f"{path.name}:{start}", f"not readable as CSV: {err}")
