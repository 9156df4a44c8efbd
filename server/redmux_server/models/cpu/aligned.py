"""Arrays that start at a cache line: a vector or tile that lies across two lines costs two reads.

NumPy starts its arrays 16 bytes behind one, as the C library hands memory out, and compiled code
32 bytes. Rows start at a line too where their length is a multiple of one.
"""

import math
import mmap
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from redmux_server.models.cpu.compiled import compiled
from redmux_server.models.settle import let_go

Array = np.ndarray[Any, Any]
LINE = 64  # bytes
SPARE_ROWS = 15  # behind the last one, which a tile of 16 rows reads and nobody uses
_SPARE_FLOATS = LINE // 4


def zeros(shape: int | Sequence[int], dtype: Any, behind: int = 0) -> Array:
    """Returns zeros that start at a line, or `behind` bytes behind one to show what that costs.

    As of np.zeros, the system hands their memory out when it is first written to.
    """
    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    num_bytes = math.prod(sizes) * np.dtype(dtype).itemsize
    room = np.zeros(num_bytes + 2 * LINE, np.uint8)
    first = -address(room) % LINE + behind
    array: Array = room[first : first + num_bytes].view(dtype).reshape(sizes)
    return array


def rows(num: int, width: int, dtype: Any, behind: int = 0) -> Array:
    """Returns zeros [num, width] whose SPARE_ROWS rows behind the last one may be read."""
    return zeros((num + SPARE_ROWS, width), dtype, behind)[:num]


def copied(array: Array, behind: int = 0) -> Array:
    """Returns a contiguous copy that starts as `zeros` does."""
    copy = zeros(array.shape, array.dtype, behind)
    copy[...] = array
    return copy


def at_line(array: Array) -> Array:
    """Returns the array, contiguous: itself where it starts at a line already, else a copy."""
    is_fit = address(array) % LINE == 0 and array.flags.c_contiguous
    return array if is_fit else copied(array)


def address(array: Array) -> int:
    """Returns where the array's first element lies."""
    where: int = array.__array_interface__["data"][0]
    return where


def give_back(array: Array) -> None:
    """Lets Linux have the memory of an array of `zeros` until it is written to again.

    What it holds is lost.
    """
    if sys.platform != "linux":
        return
    first = -(-address(array) // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (address(array) + array.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
    if size > 0:
        let_go(first, size)


@compiled
def scratch(size):
    """Returns room for `size` values of fp32 that starts at a line; for compiled code."""
    room = np.empty(size + _SPARE_FLOATS, np.float32)
    first = -np.int64(room.ctypes.data) % LINE // 4
    return room[first : first + size]
