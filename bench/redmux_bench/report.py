"""How results are told: a table on stdout, JSON in a file, progress on a terminal."""

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

import redmux

_PACKAGES = ("torch", "transformers", "numba", "grpcio")


def print_table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints rows under headings: the first column left, the others right, None as a dash."""
    table = [list(headings), *([_cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for first, *others in table:
        cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        print("  ".join((first.ljust(widths[0]), *cells)).rstrip())


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


def machine() -> dict[str, object]:
    """Returns what the figures depend on beside this project: processor, memory, versions."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "load_average": os.getloadavg(),
        "system": platform.platform(),
        "redmux": redmux.__version__,
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def progress(total: int, unit: str) -> "tqdm[Any]":
    """Returns a progress bar on stderr, silent where that is no terminal."""
    return tqdm(total=total, unit=unit, file=sys.stderr, disable=None, leave=False)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _to_json(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(f"{type(value).__name__} has no form in JSON")
