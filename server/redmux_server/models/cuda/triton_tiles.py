"""How a product of few rows is cut into programs, so that a GPU's whole memory bandwidth is used.

All programs of a product are resident at once, with enough bytes in flight, and leave half of the
shared memory to those of the next one. How many inputs a program loads at once, and how far ahead,
changes no result.
"""

import functools
from dataclasses import dataclass

import torch

from redmux_server.models.cuda.triton_early import CAN_LAUNCH_EARLY

_FEWEST_ROWS = 16  # that a matrix unit takes
_COLUMNS = (64, 32, 16)
_INNER_BYTES = (256, 128)  # of a weight's row in one load: whole lines of the cache
_FEWEST_BUFFERS = 3
_FEW_BUFFERS = 4
_MOST_BUFFERS = 7
_LARGEST_TILE = 4096  # values of the rows in one load: with more, fp32 runs out of registers


@dataclass(frozen=True, slots=True)
class Device:
    """What products must fit to."""

    num_multiprocessors: int
    shared_bytes: int  # that a program may have
    launches_early: bool  # whether a kernel can start before the one before it has ended

    @staticmethod
    def of(device: torch.device) -> "Device":
        """Returns the limits of this CUDA device."""
        properties = torch.cuda.get_device_properties(device)
        usual = properties.shared_memory_per_block
        return Device(
            properties.multi_processor_count,
            getattr(properties, "shared_memory_per_block_optin", usual),  # not in torch's stubs
            CAN_LAUNCH_EARLY and properties.major >= 9 and torch.version.hip is None,
        )


@dataclass(frozen=True, slots=True)
class Tiles:
    """One program's share of a product, and how its loop runs."""

    rows: int  # a power of two
    columns: int
    inner: int  # inputs of one load
    stages: int  # of the loop: one more than it has buffers

    def options(self) -> dict[str, int]:
        """Returns what a kernel of `triton_products` is launched with."""
        return {
            "ROWS": self.rows, "COLUMNS": self.columns, "INNER": self.inner,
            "num_stages": self.stages, "num_warps": 4,
        }  # fmt: skip


@functools.cache
def tiles_of(width: int, num_rows: int, itemsize: int, device: Device, *, gates: bool) -> Tiles:
    """Returns how [num_rows, dim] times a weight [width, dim] is cut; with `gates` two weights.

    The columns do not depend on the number of rows.
    """
    rows = max(_FEWEST_ROWS, 1 << (num_rows - 1).bit_length())
    columns = columns_of(width, device)
    programs = -(-width // columns)
    resident = -(-programs // device.num_multiprocessors)
    room = device.shared_bytes // 2 // resident
    per_input = itemsize * (2 * columns + (1 if gates else 2) * rows)
    inner, buffers = 0, 0
    for num_bytes in _INNER_BYTES:
        inner = min(num_bytes // itemsize, _LARGEST_TILE // rows)
        buffers = room // (inner * per_input)
        if buffers >= _FEW_BUFFERS:
            break
    return Tiles(rows, columns, inner, 1 + max(_FEWEST_BUFFERS, min(_MOST_BUFFERS, buffers)))


def columns_of(width: int, device: Device) -> int:
    """Returns how many of `width` columns a program has: most that leave no multiprocessor idle."""
    enough = 0.9 * device.num_multiprocessors
    return next((c for c in _COLUMNS if -(-width // c) >= enough), _COLUMNS[-1])
