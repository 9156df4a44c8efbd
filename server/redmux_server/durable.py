"""Files that are whole or not there, and synced; what the system refuses."""

import contextlib
import errno
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from redmux.errors import FailedPreconditionError, ResourceExhaustedError

logger = logging.getLogger(__name__)

_SHORTAGES = frozenset(
    (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
)


def write_whole(path: Path, data: bytes) -> None:
    """Puts a file in its place, whole and synced; what was there stays until then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(suffix=".tmp", prefix=".", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).rename(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes a rename or removal in this folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(folder: Path) -> None:
    """Removes what writes that were cut short have left; what cannot be removed harms nothing."""
    for leftover in folder.glob("**/.*.tmp"):
        try:
            if leftover.is_file():
                leftover.unlink()
        except OSError as err:
            logger.warning("cannot remove %s: %s", leftover, err.strerror)


@contextlib.contextmanager
def refusals(folder: Path, consequence: str, kind: str, contents: str) -> Iterator[None]:
    """Turns what the system refuses into an error for the caller, who learns no path.

    `kind` is what the folder is called, `contents` what there is in it to be deleted.
    """
    try:
        yield
    except OSError as err:
        logger.error("%s in %s: %s", consequence, folder, err)
        message = f"{consequence}: the server's {kind} folder cannot be changed ({err.strerror})"
        if err.errno in _SHORTAGES:
            raise ResourceExhaustedError(
                f"{message}; delete {contents}, or have its operator make room"
            ) from None
        raise FailedPreconditionError(f"{message}; its operator has to mend that") from None
