"""Files of adapters on disk: each whole or not there, and synced; what the system refuses."""

import contextlib
import errno
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from redmux.errors import FailedPreconditionError, ResourceExhaustedError
from redmux_server.registry.names import SUFFIX

logger = logging.getLogger(__name__)

_SHORTAGES = frozenset(
    (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
)


def path_of(folder: Path, name: str) -> Path:
    """Returns where the adapter of this name is kept."""
    return folder / f"{name}{SUFFIX}"


def write(folder: Path, name: str, data: bytes) -> None:
    """Puts the file of an adapter in its place.

    Raises ResourceExhaustedError or FailedPreconditionError with the system's reason, if it has
    not become durable; what was in its place is there then.
    """
    with _refusals(folder, f"adapter {name!r} is not kept"):
        path = path_of(folder, name)
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
        _sync(path.parent)
        if path.parent != folder:
            _sync(folder)


def remove(folder: Path, name: str) -> None:
    """Removes the file of an adapter, if there is one; raises as `write` does."""
    with _refusals(folder, f"adapter {name!r} is not deleted"):
        path = path_of(folder, name)
        path.unlink(missing_ok=True)  # an adapter that was loaded from elsewhere has no file here
        if path.parent.is_dir():
            _sync(path.parent)


def sweep(folder: Path) -> None:
    """Removes what writes that were cut short have left; what cannot be removed harms nothing."""
    for leftover in folder.glob("**/.*.tmp"):
        try:
            if leftover.is_file():
                leftover.unlink()
        except OSError as err:
            logger.warning("cannot remove %s: %s", leftover, err.strerror)


@contextlib.contextmanager
def _refusals(folder: Path, consequence: str) -> Iterator[None]:
    """Turns what the system refuses into an error for the caller, who learns no path."""
    try:
        yield
    except OSError as err:
        logger.error("%s in %s: %s", consequence, folder, err)
        message = f"{consequence}: the server's adapter folder cannot be changed ({err.strerror})"
        if err.errno in _SHORTAGES:
            raise ResourceExhaustedError(
                f"{message}; delete adapters, or have its operator make room"
            ) from None
        raise FailedPreconditionError(f"{message}; its operator has to mend that") from None


def _sync(folder: Path) -> None:
    """Makes a rename or removal in this folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
