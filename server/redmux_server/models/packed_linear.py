"""Frozen linear layers for the CPU, their weights laid out as they are read."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from numba import njit, prange, types
from numba.extending import overload
from torch import Tensor, nn

from redmux.errors import FailedPreconditionError
from redmux_server.models.narrow import LEVELS, narrow_row, sum_offset
from redmux_server.models.phases import claim, counters_of, finish
from redmux_server.models.vector import FASTMATH, HAS_AVX2, HAS_BF16, HAS_VNNI, PANEL, ROWS, product

Array = np.ndarray[Any, Any]

# Groups of a panel that are multiplied with every row before the next ones: they stay in the L2.
_DEPTH = 2048
# Rows of x that a thread takes on at a time.
TALL = 16 * ROWS
# Longest row whose sum of 8-bit products fits in 32 bits, with the offset of activations.
MAX_INT8_FEATURES = (2**31 - 1) // (2 * LEVELS * LEVELS)
_SMALLEST_STEP = 1e-30


class Packed(NamedTuple):
    """The weights of several linear layers, as compiled code takes them.

    Layer i has its panels from lane starts[i] on, and its other vectors from columns[i] on.
    """

    panels: Array
    starts: Array  # int64, in lanes: groups of inputs of one output
    columns: Array  # int64
    has_bias: Array  # bool
    bias: Array  # fp32
    steps: Array  # fp32, the step of each output's weights; empty where they have none
    sums: Array  # int32, the sum of each output's weights in steps; empty likewise
    totals: Array  # empty, of the type that sums have in a product
    group: int  # inputs side by side in a lane


class _Layout(NamedTuple):
    activation: type  # what `narrow_row` rounds to
    lane: type
    group: int
    total: type


def _layout(precision: str) -> _Layout:
    """Raises FailedPreconditionError for a precision that this CPU has no products of."""
    if precision == "fp32":
        return _Layout(np.float32, np.float32, 1, np.float32)
    if precision == "int8" and HAS_VNNI:
        return _Layout(np.uint8, np.int32, 4, np.int32)
    if precision == "int8" and HAS_AVX2:
        return _Layout(np.int16, np.int16, 2, np.int32)
    if precision == "bf16" and HAS_BF16:
        return _Layout(np.uint16, np.uint32, 2, np.float32)
    needed = {"int8": "AVX2", "bf16": "AVX-512 BF16"}[precision]
    raise FailedPreconditionError(
        f"products of {precision} need a CPU with {needed}, which this one has not"
    )


class Packing:
    """Room for the weights of several linear layers, which are then filled in one by one.

    Weights lie panel by panel: PANEL outputs side by side for each group of inputs. A row's result
    has the same bits whatever the number of rows: in fp32 and bf16 each output is one chain of
    multiply-adds in the order of the inputs; int8 sums whole numbers exactly. For the few rows of
    a decode step it runs at the speed of memory, where oneDNN's packed product takes up to twice
    as long.

    int8 weights have one step for each output channel and activations one for each row, where
    dynamic quantisation usually takes one for a whole tensor and one tenant's outlier ruins its
    neighbours.
    """

    def __init__(self, shapes: Sequence[tuple[int, int]], precision: str = "fp32") -> None:
        """`shapes` are (out_features, in_features).

        Raises FailedPreconditionError where this CPU has no such products, or a row is too long.
        """
        layout = _layout(precision)
        longest = max(in_features for _, in_features in shapes)
        if precision == "int8" and longest > MAX_INT8_FEATURES:
            raise FailedPreconditionError(
                f"a linear layer has {longest} inputs, int8 can sum {MAX_INT8_FEATURES} "
                f"at most; use quantization none"
            )
        self.shapes = shapes
        self.precision = precision
        self.activation = layout.activation
        lanes = [
            _round_up(out, PANEL) * self.padded(depth) // layout.group for out, depth in shapes
        ]
        widths = [_round_up(out, PANEL) for out, _ in shapes]
        is_rounded = precision == "int8"
        self.packed = Packed(
            panels=np.zeros(sum(lanes), layout.lane),
            starts=np.cumsum([0, *lanes])[:-1],
            columns=np.cumsum([0, *widths])[:-1],
            has_bias=np.zeros(len(shapes), np.bool_),
            bias=np.zeros(sum(widths), np.float32),
            steps=np.zeros(sum(widths) * is_rounded, np.float32),
            sums=np.zeros(sum(widths) * is_rounded, np.int32),
            totals=np.zeros(0, layout.total),
            group=layout.group,
        )

    def padded(self, in_features: int) -> int:
        """Returns how many values a row has that products take: a multiple of the group."""
        return _round_up(in_features, _layout(self.precision).group)

    def fill(self, i: int, weight: Tensor, bias: Tensor | None) -> None:
        """Takes layer i's weight [out_features, in_features] and bias [out_features]."""
        out_features, in_features = self.shapes[i]
        packed, depth = self.packed, self.padded(in_features)
        num_panels = -(-out_features // PANEL)
        column = int(packed.columns[i])
        some = slice(column, column + out_features)
        if bias is not None:
            packed.has_bias[i] = True
            packed.bias[some] = bias.float().numpy()
        values = weight.float()
        if self.precision == "int8":
            steps = (values.abs().amax(1) / LEVELS).clamp_min(_SMALLEST_STEP)
            values = (values / steps[:, None]).round_().to(torch.int8)
            packed.steps[some] = steps.numpy()
            packed.sums[some] = values.sum(1, dtype=torch.int32).numpy()
        elif self.precision == "bf16":
            values = values.to(torch.bfloat16)
        padded = values.new_zeros(num_panels * PANEL, depth)
        padded[:out_features, :in_features] = values
        panels = padded.view(num_panels, PANEL, depth // packed.group, packed.group)
        panels = panels.transpose(1, 2).contiguous()
        if self.precision == "bf16":
            panels = panels.view(torch.int16)
        start = int(packed.starts[i])
        flat = panels.numpy().reshape(-1).view(packed.panels.dtype)
        packed.panels[start : start + flat.size] = flat


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@njit(fastmath=FASTMATH, nogil=True, cache=True)
def _store_whole(totals, row0, rows, packed, column, columns, x, steps, out, at):
    """Writes totals of whole numbers, in steps of a row and of a column, into out."""
    offset = sum_offset(x)
    for r in range(rows):
        step = steps[row0 + r]
        for c in range(columns):
            whole = totals[r * PANEL + c] - offset * packed.sums[column + c]
            out[row0 + r, at + c] = np.float32(whole) * (step * packed.steps[column + c])


@njit(fastmath=FASTMATH, nogil=True, cache=True)
def _store_as_they_are(totals, row0, rows, packed, column, columns, x, steps, out, at):
    for r in range(rows):
        for c in range(columns):
            out[row0 + r, at + c] = totals[r * PANEL + c]


def _store(totals, row0, rows, packed, column, columns, x, steps, out, at):  # type: ignore[no-untyped-def]
    raise NotImplementedError("this is for compiled code")


@overload(_store)
def _store_of(totals, row0, rows, packed, column, columns, x, steps, out, at):  # type: ignore[no-untyped-def]
    chosen = _store_whole if totals.dtype is types.int32 else _store_as_they_are

    def store(totals, row0, rows, packed, column, columns, x, steps, out, at):  # type: ignore[no-untyped-def]
        chosen(totals, row0, rows, packed, column, columns, x, steps, out, at)

    return store


@njit(fastmath=FASTMATH, nogil=True, cache=True)
def _multiply_panel(x, steps, row0, rows, packed, i, p, out, totals):
    """Fills out[row0 : row0 + rows] for the columns of panel p of layer i."""
    depth, width = x.shape[1], out.shape[1]
    flat_x = x.reshape(-1)
    groups = depth // packed.group
    at = p * PANEL
    columns = min(PANEL, width - at)
    for k in range(0, groups, _DEPTH):
        n = min(_DEPTH, groups - k)
        product(
            rows, PANEL, flat_x, row0 * depth + k * packed.group, depth,
            packed.panels, packed.starts[i] + (p * groups + k) * PANEL, PANEL, n * packed.group,
            totals, 0, PANEL, k, 0,
        )  # fmt: skip
    column = packed.columns[i] + at
    _store(totals, row0, rows, packed, column, columns, x, steps, out, at)
    if packed.has_bias[i]:
        for r in range(row0, row0 + rows):
            for c in range(columns):
                out[r, at + c] += packed.bias[column + c]


@njit(fastmath=FASTMATH, nogil=True, cache=True)
def multiply_some(counters, thread, x, steps, packed, i, out, totals):
    """Shares out = x @ weight.T + bias of layer i among threads; returns when all is done.

    x is [rows, padded in_features] of what `narrow_row` gave, with `steps` [rows]; out is
    [rows, out_features]; `totals` is room for TALL * PANEL sums.
    """
    num_rows = x.shape[0]
    num_panels = -(-out.shape[1] // PANEL)
    num_items = num_panels * -(-num_rows // TALL)
    num_done = 0
    item = claim(counters, thread, num_items)
    while item < num_items:
        row0 = item // num_panels * TALL
        rows = min(TALL, num_rows - row0)
        _multiply_panel(x, steps, row0, rows, packed, i, item % num_panels, out, totals)
        num_done += 1
        item = claim(counters, thread, num_items)
    finish(counters, num_done, num_items)


@njit(fastmath=FASTMATH, nogil=True, parallel=True, cache=True)
def _multiply(num_threads, x, narrow, steps, packed, i, out):
    counters = counters_of(1, num_threads)
    for r in range(len(x)):
        steps[r] = narrow_row(x[r], narrow[r])
    for thread in prange(num_threads):
        totals = np.empty(TALL * PANEL, packed.totals.dtype)
        multiply_some(counters[0], thread, narrow, steps, packed, i, out, totals)


class PackedLinear(nn.Module):
    """x @ weight.T + bias of one layer of a Packing, in the packing's precision."""

    def __init__(self, packing: Packing, i: int) -> None:
        super().__init__()
        self.out_features, self.in_features = packing.shapes[i]
        self.precision = packing.precision
        self._activation = packing.activation
        self._depth = packing.padded(self.in_features)
        self._packed, self._i = packing.packed, i

    def forward(self, x: Tensor) -> Tensor:
        """Takes fp32 [..., in_features], returns [..., out_features]."""
        rows = x.reshape(-1, self.in_features).contiguous().numpy()
        narrow = rows
        if self._activation is not np.float32:
            narrow = np.zeros((len(rows), self._depth), self._activation)
        out = torch.empty(len(rows), self.out_features)
        steps = np.empty(len(rows), np.float32)
        _multiply(
            numba.get_num_threads(), rows, narrow, steps, self._packed, self._i, out.numpy()
        )
        return out.view(*x.shape[:-1], self.out_features)


def packed_linear(weight: Tensor, bias: Tensor | None, precision: str = "fp32") -> PackedLinear:
    """Returns a linear layer of weight [out_features, in_features] on its own.

    Raises what `Packing` raises.
    """
    packing = Packing([(weight.shape[0], weight.shape[1])], precision)
    packing.fill(0, weight, bias)
    return PackedLinear(packing, 0)
