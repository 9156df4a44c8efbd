"""Training data as it lies on disk: records with the place that each came from."""

import csv
import importlib.util
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from redmux.errors import InvalidArgumentError

DATASETS_PREFIX = "datasets:"
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
        """Raises InvalidArgumentError with the first faults and the number of all, if any."""
        if not self.found:
            return
        found = sorted(self.found, key=lambda fault: _in_order_of_lines(fault[0]))
        lines = [f"{where}: {message}" for where, message in found[:_MOST_SHOWN]]
        if len(self.found) > _MOST_SHOWN:
            lines.append(f"and {len(self.found) - _MOST_SHOWN} more")
        raise InvalidArgumentError(
            f"{len(self.found)} unusable record(s) in the training data:\n" + "\n".join(lines)
        )


def read_records(source: str, columns: Mapping[str, str], faults: Faults) -> list[Record]:
    """Returns the records of a .jsonl, .json or .csv file or of a data set of `datasets`.

    `source` is a path, or "datasets:NAME[:SPLIT]" (split "train" if none is given) where that
    library is installed. `columns` maps the names that training knows (prompt, completion,
    messages, text, text_pair, label, score) to those of the source, where they differ. Lines that
    cannot be read go to `faults`. Raises InvalidArgumentError where there is no such source.
    """
    if source.startswith(DATASETS_PREFIX):
        records = _from_datasets(source)
    else:
        path = Path(source).expanduser()
        readers = {".jsonl": _from_jsonl, ".json": _from_jsonl, ".csv": _from_csv}
        if path.suffix not in readers:
            raise InvalidArgumentError(
                f"cannot tell the format of {source!r}; give a .jsonl or .csv file, or "
                f"{DATASETS_PREFIX}NAME"
            )
        try:
            records = list(readers[path.suffix](path, faults))
        except OSError as err:
            raise InvalidArgumentError(f"cannot read {source}: {err.strerror}") from None
    if columns:
        records = _renamed(source, records, columns)
    if not records and not faults.found:
        raise InvalidArgumentError(f"{source} has no records")
    return records


def _in_order_of_lines(where: str) -> list[str | int]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", where)]


def _from_jsonl(path: Path, faults: Faults) -> Iterator[Record]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path.name}:{number}"
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as err:  # includes bytes that are not UTF-8
                faults.add(where, f"not valid JSON: {err}")
                continue
            if isinstance(value, dict):
                yield Record(where, value)
            else:
                faults.add(where, "not a JSON object; each line has to be one")


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


def _from_datasets(source: str) -> list[Record]:
    if importlib.util.find_spec("datasets") is None:
        raise InvalidArgumentError(
            f"{source!r} needs the library datasets; pip install datasets, or give a .jsonl file"
        )
    import datasets  # type: ignore[import-not-found, unused-ignore]

    name, _, split = source.removeprefix(DATASETS_PREFIX).partition(":")
    try:
        rows: Iterable[Mapping[str, Any]] = datasets.load_dataset(name, split=split or "train")
    except (OSError, ValueError) as err:
        raise InvalidArgumentError(f"cannot load data set {name!r}: {err}") from None
    return [Record(f"{source}:{number}", row) for number, row in enumerate(rows, 1)]


def _renamed(source: str, records: list[Record], columns: Mapping[str, str]) -> list[Record]:
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
