"""FolderLock: one server for one folder."""

import contextlib
import errno
import fcntl
import logging
import os
import socket
from pathlib import Path

from redmux.errors import FailedPreconditionError

logger = logging.getLogger(__name__)

_NAME = ".lock"
# Of file systems without locks, or without locks of files that are not written to.
_UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF)
_UNWRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT)


class FolderLock:
    """Holds a folder, which it makes if need be, until `close` or the process's end.

    Two servers on one folder would change and delete behind each other's backs.
    """

    def __init__(self, folder: Path, option: str = "data_dir", contents: str = "files") -> None:
        """Raises FailedPreconditionError where another server has it, or it can be none.

        `option` is what names the folder, `contents` what is kept in it.
        """
        self._option = option
        self._contents = contents
        self._descriptor: int | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = _open(folder / _NAME, contents)
            if self._descriptor is not None:
                self._take(folder)
        except OSError as err:
            self.close()
            raise FailedPreconditionError(
                f"{option}: {folder} cannot be used as a folder: {err.strerror}"
            ) from None

    def close(self) -> None:
        """Lets another server have the folder."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _take(self, folder: Path) -> None:
        assert self._descriptor is not None
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._descriptor, 300, 0).decode(errors="replace").strip()
            self.close()
            raise FailedPreconditionError(
                f"{self._option}: {folder} belongs to another server that runs ({holder}); two "
                f"would delete each other's {self._contents}, so stop that one or give each a "
                "folder of its own"
            ) from None
        except OSError as err:
            if err.errno not in _UNSUPPORTED:
                raise
            logger.warning("%s cannot be locked (%s); let no other server use it", folder,
                           err.strerror)  # fmt: skip
            return
        with contextlib.suppress(OSError):  # it is for people
            os.truncate(self._descriptor, 0)
            os.pwrite(self._descriptor, f"pid {os.getpid()} on {socket.gethostname()}".encode(), 0)


def _open(path: Path, contents: str) -> int | None:
    """Returns a descriptor of the lock's file, None where there is none and none can be made."""
    options = os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | options, 0o644)
    except OSError as err:
        if err.errno not in _UNWRITABLE:
            raise
        with contextlib.suppress(OSError):
            return os.open(path, os.O_RDONLY | options)
        logger.warning("%s cannot be written to (%s): %s there are served, but none can be "
                       "put or deleted", path.parent, err.strerror, contents)  # fmt: skip
        return None
