"""The index of an adapter folder: what was found in files that have not changed since."""

import hashlib
import json
import logging
import os
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import redmux
from redmux_adapters import Summary
from redmux_adapters.bases.cache import digest_of_files
from redmux_adapters.format import files as format_files
from redmux_adapters.format.config import config_value, parse_config
from redmux_adapters.format.files import read_file

logger = logging.getLogger(__name__)

_NAME = ".index.json"
_MAX_BYTES = 1 << 30
_END = ', "checksum": "%s"}'  # of the index, over everything before it


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


@cache
def _version() -> str:
    """Returns what tells versions of the checks apart, so that mended ones reach indexed files."""
    folders = Path(format_files.__file__).parent, Path(__file__).parent
    sources = [path for folder in folders for path in sorted(folder.glob("*.py"))]
    return digest_of_files(sources, redmux.__version__)


@dataclass(frozen=True, slots=True)
class Entry:
    """What was found in a file while it had this stamp."""

    stamp: Stamp
    summary: Summary
    owner: str


def read_index(folder: Path, base_fingerprint: str) -> dict[str, Entry]:
    """Returns the entry of each name, or none if the index is of another version or base.

    It only saves work: a file that does not bear its stamp is read, and so is one that would not be
    accepted as it is listed here; vectors are checked against the digest whenever they are read.
    So an index that is lost, old or broken harms nothing.
    """
    path = folder / _NAME
    try:
        if not path.exists():
            return {}
        table = _checked(read_file(path, _MAX_BYTES))
        if (table["version"], table["base"]) != (_version(), base_fingerprint):
            return {}
        return {name: _entry(values) for name, values in table["files"].items()}
    except Exception as err:  # whatever somebody has made of it
        logger.warning("%s is ignored, files are read instead: %s", path, repr(err)[:200])
        return {}


def write_index(folder: Path, base_fingerprint: str, entries: Mapping[str, Entry]) -> None:
    """Replaces the index; a failure is logged, since the index only saves work."""
    table = {
        "version": _version(),
        "base": base_fingerprint,
        "files": {name: _values(entry) for name, entry in entries.items()},
    }
    try:
        descriptor, temporary = tempfile.mkstemp(suffix=".tmp", prefix=".", dir=folder)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(_with_checksum(table))
            Path(temporary).rename(folder / _NAME)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as err:
        logger.warning("cannot write %s: %s", folder / _NAME, err)


def _with_checksum(table: Mapping[str, Any]) -> str:
    text = json.dumps(table)[:-1]  # `dump` would encode piece by piece, in Python
    return text + _END % hashlib.sha256(text.encode()).hexdigest()


def _checked(data: bytes) -> Any:
    """Returns the table in the bytes of an index; raises ValueError where they are not all there.

    So nothing is parsed but what `write_index` wrote.
    """
    text = data[: -len(_END % "") - 64]
    if data != text + (_END % hashlib.sha256(text).hexdigest()).encode():
        raise ValueError("its checksum is another one")
    return json.loads(data)


def _values(entry: Entry) -> list[Any]:
    summary = entry.summary
    counts = [summary.num_sites, summary.num_parameters, summary.num_head_parameters]
    config = json.dumps(config_value(summary.config))
    return [list(entry.stamp), entry.owner, summary.digest, *counts, config]


def _entry(values: list[Any]) -> Entry:
    stamp, owner, digest, *counts, config = values
    numbers = [*stamp, *counts]
    texts = owner, digest, config
    if not all(type(n) is int for n in numbers) or not all(isinstance(t, str) for t in texts):
        raise ValueError(f"an entry is {values!r}"[:200])
    num_sites, num_parameters, num_head_parameters = counts
    summary = Summary(parse_config(config), digest, num_sites, num_parameters, num_head_parameters)
    return Entry(Stamp(*stamp), summary, owner)
