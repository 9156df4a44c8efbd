"""Give the system back the memory that loading has needed and serving does not."""

import ctypes
import mmap
import sys
from collections.abc import Iterator
from pathlib import Path


def settle() -> None:
    """Lets go of memory that was freed, and of pages of libraries that were read once."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    if sys.platform == "linux":
        for first, size in _unchanged(Path("/proc/self/smaps").read_text()):
            let_go(first, size)


def let_go(first: int, size: int) -> None:
    """Gives whole pages from an address on back to Linux, with what this process has written there.

    They come back when they are next used: as their file has them, or full of zeros.
    """
    advise = ctypes.CDLL(None).madvise
    advise(ctypes.c_void_p(first), ctypes.c_size_t(size), mmap.MADV_DONTNEED)


def _unchanged(smaps: str) -> Iterator[tuple[int, int]]:
    """Yields (address, size) of where libraries lie as their files have them, which nobody changes.

    What is used again comes back from the file, or rather from the system's cache of it. Most has
    been used once, when modules were imported and kernels linked, and counts as this process's
    until the system is short of memory.
    """
    first, size = 0, 0
    for line in smaps.splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):  # "7f00-7f80 r-xp 00000000 08:01 123  /usr/lib/libc.so.6"
            start, _, end = name.partition("-")
            first, size = int(start, 16), int(end, 16) - int(start, 16)
            if rest[0] not in ("r-xp", "r--p") or ".so" not in rest[-1]:
                size = 0
        elif name == "Anonymous:" and rest[0] == "0" and size:  # else relocations are written there
            yield first, size
