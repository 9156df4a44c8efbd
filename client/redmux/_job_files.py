"""Training data and descriptions of jobs, as files of the one who asks for the training."""

import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from redmux._job_calls import record_message
from redmux.errors import InvalidArgumentError
from redmux.job_types import TrainingTask
from redmux.training_data import Faults, read_file, renamed

_TASK_KEYS = ("name", "data", "valid", "columns")
_PLACE = re.compile(r"tasks\[\d+\]\.(?:records|valid)\[\d+\]")


class JobFiles:
    """The tasks of a job as they are read from files, and where each of their records lies."""

    def __init__(self) -> None:
        self.tasks: list[TrainingTask] = []
        self._faults = Faults()
        self._lines: dict[str, str] = {}  # "tasks[0].records[2]" -> "data.jsonl:4"

    def add(
        self,
        name: str,
        data: Path,
        valid: Path | None,
        options: Mapping[str, Any],
        columns: Mapping[str, str] | None = None,
    ) -> None:
        """Reads the files of one more task; raises InvalidArgumentError for what is no data."""
        place = f"tasks[{len(self.tasks)}]"
        records = self._read(f"{place}.records", data, columns or {})
        held_out = () if valid is None else self._read(f"{place}.valid", valid, columns or {})
        self.tasks.append(TrainingTask(name, records, held_out, options))  # type: ignore[arg-type]

    def check(self) -> None:
        """Raises InvalidArgumentError that tells all lines which no message can hold."""
        self._faults.raise_any()

    def with_lines(self, text: str) -> str:
        """Returns a message with file and line in place of the tasks' records."""
        return _PLACE.sub(lambda found: self._lines.get(found[0], found[0]), text)

    def _read(self, place: str, path: Path, columns: Mapping[str, str]) -> list[Mapping[str, Any]]:
        faults = Faults()
        records = renamed(path.name, read_file(path, faults), columns)
        if not records and not faults.found:
            raise InvalidArgumentError(f"{path} has no records")
        for index, record in enumerate(records):
            self._lines[f"{place}[{index}]"] = record.where
            try:
                record_message(record.fields)
            except InvalidArgumentError as error:
                faults.add(record.where, error.message)
        self._faults.found += faults.found
        return [record.fields for record in records]


def read_tasks(path: Path, overrides: Mapping[str, Any]) -> JobFiles:
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
    files = JobFiles()
    for item in tasks:
        _add_task(files, path.parent, {**defaults, **item, **overrides})
    return files


def _add_task(files: JobFiles, folder: Path, values: dict[str, Any]) -> None:
    name, data = values.get("name"), values.get("data")
    if not isinstance(name, str) or not isinstance(data, str):
        raise InvalidArgumentError(f"a task has the name {name!r} and the data {data!r}; give both")
    columns, valid = values.get("columns"), values.get("valid")
    if columns is not None and not isinstance(columns, dict):
        raise InvalidArgumentError(f"columns of {name!r} is {columns!r}; give a table of names")
    options = {key: value for key, value in values.items() if key not in _TASK_KEYS}
    files.add(
        name,
        folder / Path(data).expanduser(),
        None if valid is None else folder / Path(valid).expanduser(),
        options,
        columns,
    )
