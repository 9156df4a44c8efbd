"""How a run is told beside its tables: JSON in a file, progress on a terminal."""

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from redmux_bench.machine import machine


def write_json(
    options: argparse.Namespace, model: str | None, results: Mapping[str, object]
) -> None:
    """Writes the results, how they were got and on what, if --json names a file."""
    if options.json is None:
        return
    subject = {} if model is None else {"model": model}
    how = {"command": options.command_line, "machine": machine()}
    content = {**results, **subject, **how}
    text = json.dumps(content, indent=1, default=_to_json)
    Path(options.json).write_text(text + "\n", encoding="utf-8")


def progress(total: int, unit: str) -> "tqdm[Any]":
    """Returns a progress bar on stderr, silent where that is no terminal."""
    return tqdm(total=total, unit=unit, file=sys.stderr, disable=None, leave=False)


def _to_json(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(f"{type(value).__name__} has no form in JSON")
