"""Training data of a run: files, or a data set of the library `datasets`."""

import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from redmux.errors import InvalidArgumentError
from redmux.training_data import Faults, Record, read_file, renamed

DATASETS_PREFIX = "datasets:"


def read_records(source: str, columns: Mapping[str, str], faults: Faults) -> list[Record]:
    """Returns the records of a .jsonl, .json or .csv file or of a data set of `datasets`.

    `source` is a path, or "datasets:NAME[:SPLIT]" (split "train" if none is given) where that
    library is installed. `columns` maps the names that training knows (prompt, prompt_pair,
    completion, messages, text, text_pair, label, score) to those of the source, where they differ.
    Lines that cannot be read go to `faults`. Raises InvalidArgumentError where there is no such
    source.
    """
    if source.startswith(DATASETS_PREFIX):
        records = _from_datasets(source)
    else:
        records = read_file(Path(source).expanduser(), faults)
    if columns:
        records = renamed(source, records, columns)
    if not records and not faults.found:
        raise InvalidArgumentError(f"{source} has no records")
    return records


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
