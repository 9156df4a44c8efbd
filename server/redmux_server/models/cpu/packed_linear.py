"""Products of frozen linear layers on the CPU, shared by threads."""

from collections.abc import Callable, Sequence

import numba
import numpy as np
import torch
from numba import prange, types
from numba.extending import overload
from torch import Tensor, nn

from redmux_server.models.cpu import aligned
from redmux_server.models.cpu.aligned import scratch
from redmux_server.models.cpu.arithmetic import PANEL, ROWS
from redmux_server.models.cpu.block_kernel import BLOCK, block_bytes
from redmux_server.models.cpu.compiled import compiled
from redmux_server.models.cpu.narrow import PART, narrow_row
from redmux_server.models.cpu.packing import Packing
from redmux_server.models.cpu.phases import claim, counters_of, finish
from redmux_server.models.cpu.tiles import TILE_ROWS, bf16_tiles, configure, int8_tile, release
from redmux_server.models.cpu.vector import START, block_product, product, step_product, store_panel

# Groups of a panel that are multiplied with every row before the next ones: they stay in the L2.
_DEPTH = 2048
_COLUMNS = np.int64(PANEL)  # see START
_SMALL_BLOCK, _LARGE_BLOCK = block_bytes(4), block_bytes(8)
# Rows of x that a thread takes on at a time.
TALL = 16 * ROWS
# Rows from which on a tile of int8, which always takes 16, is faster than vectors.
_FEWEST_IN_TILE = 12


@compiled
def _sum_floats(x, steps, row0, rows, packed, i, p, sums):
    depth = x.shape[1]
    groups = depth // packed.group
    # Where a panel is passed over more than once, the next one comes from memory meanwhile.
    ahead = groups * PANEL * (rows > ROWS)
    for k in range(0, groups, _DEPTH):
        n = min(_DEPTH, groups - k)
        product(
            rows, _COLUMNS, x.reshape(-1), row0 * depth + k * packed.group, depth,
            packed.panels, packed.starts[i] + (p * groups + k) * PANEL, START, n * packed.group,
            sums, START, _COLUMNS, k, ahead,
        )  # fmt: skip


@compiled
def _sum_floats_in_tiles(x, steps, row0, rows, packed, i, p, sums):
    depth = x.shape[1]
    panel = depth // packed.group * PANEL
    for r in range(0, rows, 2 * TILE_ROWS):
        bf16_tiles(
            2 if rows - r > TILE_ROWS else 1, x, (row0 + r) * depth, depth,
            packed.panels, packed.starts[i] + p * panel, depth, sums, r * PANEL,
            panel if r == 0 else 0,
        )  # fmt: skip


@compiled
def _sum_integers(x, steps, row0, rows, packed, i, p, sums):
    depth, stride = x.shape[1], steps.shape[1]
    step_product(
        rows, x.reshape(-1), row0 * depth, depth,
        packed.panels, packed.starts[i] + p * (depth // packed.group) * PANEL, depth, PART,
        packed.firsts, packed.firsts_at[i] + p * -(-depth // PART) * PANEL,
        steps.reshape(-1), row0 * stride, stride, sums, START,
    )  # fmt: skip


@compiled
def _sum_integers_in_tiles(x, steps, row0, rows, packed, i, p, sums):
    depth, stride = x.shape[1], steps.shape[1]
    panel = depth // packed.group * PANEL
    at, first_at = packed.starts[i] + p * panel, packed.firsts_at[i] + p * (depth // PART) * PANEL
    r = 0
    while rows - r >= _FEWEST_IN_TILE:
        int8_tile(
            x, (row0 + r) * depth, depth, packed.panels, at, depth, packed.firsts, first_at,
            steps, (row0 + r) * stride, stride, sums, r * PANEL, panel if r == 0 else 0,
        )  # fmt: skip
        r += TILE_ROWS
    if r < rows:
        step_product(
            rows - r, x.reshape(-1), (row0 + r) * depth, depth, packed.panels, at, depth, PART,
            packed.firsts, first_at, steps.reshape(-1), (row0 + r) * stride, stride, sums,
            r * PANEL,
        )  # fmt: skip


@compiled
def _sum_blocks(x, steps, row0, rows, packed, i, p, sums):
    depth, stride = x.shape[1], steps.shape[1]
    bits = packed.bits[i]
    size = _SMALL_BLOCK if bits == 4 else _LARGE_BLOCK
    block_product(
        rows, bits, x.reshape(-1), row0 * depth, depth,
        packed.panels, packed.starts[i] + p * (depth // BLOCK) * size, depth,
        steps.reshape(-1), row0 * stride, stride, sums, START,
    )  # fmt: skip


def _sum(x, steps, row0, rows, packed, i, p, sums):
    """sums[:rows] = x[row0 : row0 + rows] @ panel p of layer i."""
    raise NotImplementedError("this is for compiled code")


@overload(_sum)
def _sum_of(x, steps, row0, rows, packed, i, p, sums):
    uses_tiles = isinstance(packed[packed.fields.index("tiles")], types.Array)
    if x.dtype is types.int8:
        chosen = _sum_blocks
    elif x.dtype in (types.float32, types.uint16):
        chosen = _sum_floats_in_tiles if uses_tiles else _sum_floats
    else:
        chosen = _sum_integers_in_tiles if uses_tiles else _sum_integers

    def call(x, steps, row0, rows, packed, i, p, sums):
        chosen(x, steps, row0, rows, packed, i, p, sums)

    return call


@compiled
def _multiply_panel(x, steps, row0, rows, packed, i, p, out, sums):
    """Fills out[row0 : row0 + rows] for the columns of panel p of layer i."""
    _sum(x, steps, row0, rows, packed, i, p, sums)
    at = p * PANEL
    first, width = packed.columns[i] + at, out.shape[1]
    if packed.widths[i] - at >= PANEL:
        flat = out.reshape(-1)
        store_panel(rows, sums, packed.scale, packed.bias, first, flat, row0 * width + at, width)
    else:
        store_panel(rows, sums, packed.scale, packed.bias, first, sums, 0, PANEL)
        for r in range(rows):
            for c in range(packed.widths[i] - at):
                out[row0 + r, at + c] = sums[r * PANEL + c]


@compiled
def multiply_some(counters, thread, x, steps, packed, i, out, sums):
    """Shares out = x @ weight.T + bias of layer i among threads; returns when all is done.

    x is [rows, padded in_features] of what `narrow_row` gave, with `steps` [rows, any], both with
    spare rows behind them; out is [rows, out_features or more]; `sums` is room for TALL * PANEL
    values of fp32. With tiles the thread has configured its own.
    """
    num_rows = x.shape[0]
    num_panels = -(-packed.widths[i] // PANEL)
    num_items = num_panels * -(-num_rows // TALL)
    num_done = 0
    item = claim(counters, thread, num_items)
    while item < num_items:
        row0 = item // num_panels * TALL
        rows = min(TALL, num_rows - row0)
        _multiply_panel(x, steps, row0, rows, packed, i, item % num_panels, out, sums)
        num_done += 1
        item = claim(counters, thread, num_items)
    finish(counters, num_done, num_items)


@compiled(parallel=True)
def _multiply(num_threads, x, narrow, steps, packed, i, out):
    counters = counters_of(1, num_threads)
    for r in range(len(x)):
        narrow_row(x[r], narrow[r], steps[r])
    for index in prange(num_threads):
        thread = np.int64(index)
        sums = scratch(TALL * PANEL)
        configure(packed.tiles)
        multiply_some(counters[0], thread, narrow, steps, packed, i, out, sums)
        release(packed.tiles)


@compiled(parallel=True)
def _multiply_all(num_threads, rows, x, steps, packed, layers, depths, out):
    counters = counters_of(len(layers), num_threads)
    for index in prange(num_threads):
        thread = np.int64(index)
        sums = scratch(TALL * PANEL)
        configure(packed.tiles)
        for n in range(len(layers)):
            i = layers[n]
            width, depth = packed.widths[i], depths[i]
            multiply_some(
                counters[n], thread, x[: rows * depth].reshape(rows, depth), steps, packed, i,
                out[: rows * width].reshape(rows, width), sums,
            )  # fmt: skip
        release(packed.tiles)


def products(
    packing: Packing, layers: Sequence[int], num_rows: int, behind: int = 0
) -> Callable[[], None]:
    """Returns what runs the products of these layers, on as many rows that mean nothing.

    Nothing is computed between them: a step that needs them can't be faster. Inputs and outputs
    start `behind` bytes behind a cache line.
    """
    depths = np.array([packing.padded(depth) for _, depth in packing.shapes], np.int64)
    longest, widest = max(depths[layers]), max(packing.shapes[i][0] for i in layers)
    x = aligned.rows(num_rows, longest, packing.activation, behind)
    steps = aligned.rows(num_rows, packing.num_steps(longest), np.float32, behind)
    x[...], steps[...] = 1, 1
    out = aligned.zeros(num_rows * widest, np.float32, behind)
    flat, order = x.reshape(-1), np.array(layers, np.int64)

    def run() -> None:
        threads = numba.get_num_threads()
        _multiply_all(threads, num_rows, flat, steps, packing.packed, order, depths, out)

    return run


class PackedLinear(nn.Module):
    """x @ weight.T + bias of one layer of a Packing, in the packing's precision."""

    def __init__(self, packing: Packing, i: int) -> None:
        super().__init__()
        self.out_features, self.in_features = packing.shapes[i]
        self.packing, self.index = packing, i

    def forward(self, x: Tensor) -> Tensor:
        """Takes fp32 [..., in_features], returns [..., out_features]."""
        rows = x.reshape(-1, self.in_features).contiguous().numpy()
        packing, narrow = self.packing, rows
        if packing.activation is not np.float32:
            width = packing.padded(self.in_features)
            narrow = aligned.rows(len(rows), width, packing.activation)
        out = torch.empty(len(rows), self.out_features)
        steps = aligned.rows(len(rows), packing.num_steps(self.in_features), np.float32)
        threads = numba.get_num_threads()
        _multiply(threads, rows, narrow, steps, packing.packed, self.index, out.numpy())
        return out.view(*x.shape[:-1], self.out_features)


def packed_linear(
    weight: Tensor, bias: Tensor | None, precision: str = "fp32", is_head: bool = False
) -> PackedLinear:
    """Returns a linear layer of weight [out_features, in_features] on its own.

    `is_head` tells whether it is the one that gives logits. Raises what `Packing` raises.
    """
    packing = Packing([(weight.shape[0], weight.shape[1])], precision, head=0 if is_head else None)
    packing.fill(0, weight, bias)
    return PackedLinear(packing, 0)
