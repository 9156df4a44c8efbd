"""Whether this process may use the tile registers of AMX, which Linux grants on request."""

import ctypes
import os
import sys
from functools import cache

from redmux_server.models.cpu.arithmetic import HAS_TILES

# Of asm/prctl.h and unistd_64.h; the state component is that of the tiles' data.
_ARCH_PRCTL, _GET_PERMITTED, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1022, 0x1023, 18


@cache
def why_no_tiles() -> str | None:
    """Returns what keeps this process from using tiles, or None where they are granted.

    Asks once: products of bf16 have other bits in tiles, so that one process uses them always or
    never. Children of a fork inherit what was granted.
    """
    if not HAS_TILES:
        return "this CPU has no AMX for int8 and bf16"
    if sys.platform != "linux":
        return f"not known how to ask {sys.platform} for them"
    return _ask()


def _ask() -> str | None:
    """Requests the permission, which kernels before 5.16 and seccomp filters refuse."""
    permitted = ctypes.c_uint64()
    refused = _arch_prctl(_REQUEST_PERMISSION, ctypes.c_ulong(_TILE_DATA))
    # A filter may answer 0 without having asked the kernel.
    refused = refused or _arch_prctl(_GET_PERMITTED, ctypes.byref(permitted))
    if refused:
        return f"the system refuses AMX: {os.strerror(refused)}"
    if not permitted.value >> _TILE_DATA & 1:
        return "the system has not granted AMX"
    return None


def _arch_prctl(code: int, argument: object) -> int:
    """Returns the error's number, or 0."""
    library = ctypes.CDLL(None, use_errno=True)
    failed = library.syscall(ctypes.c_long(_ARCH_PRCTL), ctypes.c_long(code), argument)
    return ctypes.get_errno() if failed else 0
