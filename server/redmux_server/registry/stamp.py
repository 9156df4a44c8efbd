"""Stamp: tells whether a file is the one that was read."""

import os
import stat
from pathlib import Path
from typing import NamedTuple


class Stamp(NamedTuple):
    """Any write or rename of a file changes one of these."""

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
