"""The cache folder: what was made of files once, found again while they are the same."""

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

logger = logging.getLogger(__name__)

_UNUSED_S = 30 * 86400.0  # after which a folder goes
_UNFINISHED_S = 86400.0  # after which nobody is at work on a folder any more
_TICK_NS = 1_000_000_000  # file systems may give the same time to writes so close together


def cache_folder() -> Path:
    """Returns the folder for what is made of models and kernels: REDMUX_CACHE or its default."""
    return Path(os.environ.get("REDMUX_CACHE") or Path.home() / ".cache" / "redmux")


def digest_of_files(paths: Iterable[Path], *more: str) -> str:
    """Returns the SHA-256 of some small files' names and contents, and of `more`."""
    digest = hashlib.sha256()
    parts = [part for path in paths for part in (path.name.encode(), path.read_bytes())]
    for part in (*parts, *(text.encode() for text in more)):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def digest_of_content(path: Path) -> str:
    """Returns the SHA-256 of a large file.

    It is read anew only if its size, inode or times are not those that it had then; so any write
    is seen, and a start does not read gigabytes.
    """
    path = path.resolve()
    record = cache_folder() / "files" / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:16]}.json"
    stamp = _stamp(path)
    known = _read_record(record)
    if known is not None and known[0] == stamp:
        return known[1]
    with path.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    # A write within the same tick of the clock could leave the stamp as it is.
    if _stamp(path) == stamp and time.time_ns() - stamp[-1] > _TICK_NS:
        _write_record(record, stamp, content)
    return content


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]


def _read_record(path: Path) -> tuple[list[int], str] | None:
    try:
        value = json.loads(path.read_bytes())
        return value["stamp"], str(value["sha256"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _write_record(path: Path, stamp: list[int], content: str) -> None:
    """Keeps a digest; a failure is logged, since it only saves work."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=".", dir=path.parent)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump({"stamp": stamp, "sha256": content}, file)
        Path(temporary).rename(path)
    except OSError as err:
        logger.warning("cannot write %s: %s", path, err)


def mark_used(folder: Path) -> None:
    """Keeps a folder from being removed as unused."""
    now_s = time.time()
    try:
        os.utime(folder, (now_s, now_s))
    except OSError as err:  # of another user, or read-only
        logger.debug("cannot touch %s: %s", folder, err)


def remove_unused(folder: Path) -> None:
    """Removes what lies in `folder` and was not used for a month, and what was never finished."""
    now_s = time.time()
    for path in folder.iterdir() if folder.is_dir() else ():
        limit_s = _UNFINISHED_S if path.name.startswith(".") else _UNUSED_S
        try:
            is_old = now_s - path.stat().st_mtime > limit_s
        except OSError:  # another process was faster
            continue
        if is_old:
            remove(path)


def remove(path: Path) -> None:
    """Removes a file or folder of the cache, as far as that is possible."""
    logger.info("removing %s from the cache", path.name)
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
