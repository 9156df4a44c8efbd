"""Training data and descriptions of jobs, as files of the one who asks for the training."""

import csv
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from redmux.errors import InvalidArgumentError
from redmux.types import TrainingTask

_TASK_KEYS = ("name", "data", "valid", "columns")


def read_records(path: Path, columns: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """Returns the records of a .jsonl or .csv file; `columns` maps known names to the file's.

    Raises InvalidArgumentError, with file and line, for what is no record, OSError for a file that
    cannot be read.
    """
    readers = {".jsonl": _from_jsonl, ".csv": _from_csv}
    if path.suffix not in readers:
        raise InvalidArgumentError(
            f"cannot tell the format of {str(path)!r}; give a .jsonl or .csv file"
        )
    try:
        records = readers[path.suffix](path)
    except UnicodeDecodeError as error:
        raise InvalidArgumentError(f"{path.name} is not UTF-8: {error}") from None
    if not records:
        raise InvalidArgumentError(f"{path} has no records")
    for name, column in (columns or {}).items():
        if not any(column in record for record in records):
            raise InvalidArgumentError(f"{path.name} has no column {column!r} for {name}")
        for record in records:
            if column in record:
                record[name] = record.pop(column)
    return records


def read_tasks(path: Path, overrides: Mapping[str, Any]) -> list[TrainingTask]:
    """Returns the tasks of a .toml or .json file: `defaults`, and `tasks` with name and data.

    Other keys of both are options of training; `overrides` come before them. Relative paths start
    from the file's folder. Raises InvalidArgumentError.
    """
    text = path.read_text(encoding="utf-8")
    try:
        value = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except ValueError as error:
        raise InvalidArgumentError(f"{path} is neither valid TOML nor JSON: {error}") from None
    tasks = value.get("tasks") if isinstance(value, dict) else None
    if not isinstance(tasks, list) or not all(isinstance(item, dict) for item in tasks):
        raise InvalidArgumentError(f"{path.name} has no list of tasks")
    for key in value:
        if key not in ("defaults", "tasks"):
            raise InvalidArgumentError(
                f"{path.name} has the key {key!r}, which is the server's to choose; a job has "
                "defaults and tasks"
            )
    defaults = value.get("defaults", {})
    if not isinstance(defaults, dict):
        raise InvalidArgumentError(f"defaults of {path.name} is {defaults!r}; give a table")
    return [_task(path.parent, {**defaults, **item, **overrides}) for item in tasks]


def _task(folder: Path, values: dict[str, Any]) -> TrainingTask:
    name, data = values.get("name"), values.get("data")
    if not isinstance(name, str) or not isinstance(data, str):
        raise InvalidArgumentError(f"a task has the name {name!r} and the data {data!r}; give both")
    columns, valid = values.get("columns"), values.get("valid")
    if columns is not None and not isinstance(columns, dict):
        raise InvalidArgumentError(f"columns of {name!r} is {columns!r}; give a table of names")
    options = {key: value for key, value in values.items() if key not in _TASK_KEYS}
    return TrainingTask(
        name,
        read_records(folder / Path(data).expanduser(), columns),
        read_records(folder / Path(valid).expanduser(), columns) if valid is not None else (),
        options,  # type: ignore[arg-type]
    )


def _from_jsonl(path: Path) -> list[dict[str, Any]]:
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InvalidArgumentError(f"{path.name}:{number}: not valid JSON: {error}") from None
        if not isinstance(record, dict):
            raise InvalidArgumentError(f"{path.name}:{number}: not a JSON object")
        records.append(record)
    return records


def _from_csv(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True, restval=None)
        try:
            records: list[dict[str, Any]] = list(reader)
        except csv.Error as error:
            raise InvalidArgumentError(f"{path.name}:{reader.line_num}: {error}") from None
    for index, record in enumerate(records, 1):
        if None in record or None in record.values():
            raise InvalidArgumentError(
                f"record {index} of {path.name} has not as many columns as its header"
            )
    return records
