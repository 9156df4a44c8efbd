"""The index of an adapter folder: what was found in files that have not changed since."""

import json
import logging
import os
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import redmux
from redmux.errors import InvalidAdapterError
from redmux_adapters import Summary
from redmux_adapters.format.config import config_value, parse_config

logger = logging.getLogger(__name__)

_NAME = ".index.json"


class Stamp(NamedTuple):
    """Tells whether a file is the one that was read: any write or rename changes one of these."""

    size: int
    inode: int
    modified_ns: int
    changed_ns: int

    @classmethod
    def of(cls, path: Path) -> "Stamp | None":
        """Returns the stamp of a regular file, None for anything else."""
        try:
            status = os.stat(path, follow_symlinks=False)
        except OSError:
            return None
        if not stat.S_ISREG(status.st_mode):
            return None
        return cls(status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)


@dataclass(frozen=True, slots=True)
class Entry:
    """What was found in a file while it had this stamp."""

    stamp: Stamp
    summary: Summary


def read_index(folder: Path, base_fingerprint: str) -> dict[str, Entry]:
    """Returns the entry of each name, or none if the index is of another version or base.

    It only saves work: a file that does not bear its stamp is read, and vectors are checked against
    the digest whenever they are read. So an index that is lost, old or broken harms nothing.
    """
    try:
        table = json.loads((folder / _NAME).read_bytes())
        if (table["version"], table["base"]) != (redmux.__version__, base_fingerprint):
            return {}
        return {name: _entry(values) for name, values in table["files"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, InvalidAdapterError) as err:
        logger.warning("%s is ignored: %r", folder / _NAME, err)
        return {}


def write_index(folder: Path, base_fingerprint: str, entries: Mapping[str, Entry]) -> None:
    """Replaces the index; a failure is logged, since the index only saves work."""
    table = {
        "version": redmux.__version__,
        "base": base_fingerprint,
        "files": {name: _values(entry) for name, entry in entries.items()},
    }
    try:
        descriptor, temporary = tempfile.mkstemp(suffix=".tmp", prefix=".", dir=folder)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(json.dumps(table))  # `dump` would encode piece by piece, in Python
            Path(temporary).rename(folder / _NAME)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as err:
        logger.warning("cannot write %s: %s", folder / _NAME, err)


def _values(entry: Entry) -> list[Any]:
    summary = entry.summary
    counts = [summary.num_sites, summary.num_parameters, summary.num_head_parameters]
    return [list(entry.stamp), summary.digest, *counts, json.dumps(config_value(summary.config))]


def _entry(values: list[Any]) -> Entry:
    stamp, digest, *counts, config = values
    if not isinstance(digest, str) or not all(isinstance(count, int) for count in counts):
        raise ValueError(f"an entry is {values!r}"[:200])
    num_sites, num_parameters, num_head_parameters = counts
    summary = Summary(parse_config(config), digest, num_sites, num_parameters, num_head_parameters)
    return Entry(Stamp(*stamp), summary)
