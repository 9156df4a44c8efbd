"""Frozen linear layers for the CPU, their weights laid out as they are read."""

from collections.abc import Sequence
from typing import NamedTuple

import numba
import numpy as np
import torch
import torch.nn.functional as F
from numba import prange, types
from numba.extending import overload
from torch import Tensor, nn

from redmux.errors import FailedPreconditionError
from redmux_server.models.cpu.arithmetic import HAS_AVX2, HAS_BF16, HAS_VNNI, PANEL, ROWS
from redmux_server.models.cpu.compiled import compiled
from redmux_server.models.cpu.narrow import LEVELS, OFFSET, PART, SMALLEST_STEP, narrow_row
from redmux_server.models.cpu.phases import claim, counters_of, finish
from redmux_server.models.cpu.vector import Array, product, step_product, store_panel

# Groups of a panel that are multiplied with every row before the next ones: they stay in the L2.
_DEPTH = 2048
# Rows of x that a thread takes on at a time.
TALL = 16 * ROWS


class Packed(NamedTuple):
    """The weights of several linear layers, as compiled code takes them.

    Layer i has its panels from lane starts[i] on, and its other vectors from columns[i] on.
    """

    panels: Array
    starts: Array  # int64, in lanes: groups of inputs of one output
    columns: Array  # int64
    widths: Array  # int64, outputs of each layer
    bias: Array  # fp32
    scale: Array  # fp32: the step of each output's weights, 1 where they have none
    firsts: Array  # int32, what the sum of a part starts from, [parts, PANEL] for each panel
    firsts_at: Array  # int64 [layers], where those of a layer start
    group: int  # inputs side by side in a lane


class _Layout(NamedTuple):
    activation: type  # what `narrow_row` rounds to
    lane: type
    group: int


def _layout(precision: str) -> _Layout:
    """Raises FailedPreconditionError for a precision that this CPU has no products of."""
    if precision == "fp32":
        return _Layout(np.float32, np.float32, 1)
    if precision == "int8" and HAS_VNNI:
        return _Layout(np.uint8, np.int32, 4)
    if precision == "int8" and HAS_AVX2:
        return _Layout(np.int16, np.int16, 2)
    if precision == "bf16" and HAS_BF16:
        return _Layout(np.uint16, np.uint32, 2)
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

    int8 weights have one step for each output channel and activations one for every PART of a row,
    where dynamic quantisation usually takes one for a whole tensor and one tenant's outlier ruins
    its neighbours.
    """

    def __init__(self, shapes: Sequence[tuple[int, int]], precision: str = "fp32") -> None:
        """`shapes` are (out_features, in_features).

        Raises FailedPreconditionError where this CPU has no such products.
        """
        layout = _layout(precision)
        self.shapes = shapes
        self.precision = precision
        self.activation = layout.activation
        self._group = layout.group
        lanes = [
            _round_up(out, PANEL) * self.padded(depth) // layout.group for out, depth in shapes
        ]
        widths = [_round_up(out, PANEL) for out, _ in shapes]
        is_rounded = precision == "int8"
        firsts = [w * num_parts(depth) for w, (_, depth) in zip(widths, shapes, strict=True)]
        self.packed = Packed(
            panels=np.zeros(sum(lanes), layout.lane),
            starts=np.cumsum([0, *lanes])[:-1],
            columns=np.cumsum([0, *widths])[:-1],
            widths=np.array([out for out, _ in shapes], np.int64),
            bias=np.zeros(sum(widths), np.float32),
            scale=np.ones(sum(widths), np.float32),
            firsts=np.zeros(sum(firsts) * is_rounded, np.int32),
            firsts_at=np.cumsum([0, *firsts])[:-1],
            group=layout.group,
        )

    def padded(self, in_features: int) -> int:
        """Returns how many values a row has that products take: a multiple of the group."""
        return _round_up(in_features, self._group)

    def fill(self, i: int, weight: Tensor, bias: Tensor | None) -> None:
        """Takes layer i's weight [out_features, in_features] and bias [out_features]."""
        out_features, in_features = self.shapes[i]
        packed, depth = self.packed, self.padded(in_features)
        column = int(packed.columns[i])
        some = slice(column, column + out_features)
        if bias is not None:
            packed.bias[some] = bias.float().numpy()
        values = weight.float()
        if self.precision == "int8":
            steps = (values.abs().amax(1) / LEVELS).clamp_min(float(SMALLEST_STEP))
            values = (values / steps[:, None]).round_().to(torch.int8)
            packed.scale[some] = steps.numpy()
        elif self.precision == "bf16":
            values = values.to(torch.bfloat16).view(torch.int16)
        if depth > in_features:
            values = F.pad(values, (0, depth - in_features))
        num_panels, start = -(-out_features // PANEL), int(packed.starts[i])
        lanes = packed.panels[start : start + num_panels * depth // packed.group * PANEL]
        panels = torch.from_numpy(lanes.view(values.numpy().dtype))
        panels = panels.view(num_panels, -1, PANEL, packed.group)
        # Straight into place: memory that a process has not used yet is slow to come.
        rows = values.reshape(out_features, -1, packed.group)
        whole, rest = divmod(out_features, PANEL)
        first, last = rows.split([whole * PANEL, rest])
        panels[:whole] = first.unflatten(0, (whole, PANEL)).transpose(1, 2)
        panels[whole:, :, :rest] = last.transpose(0, 1)
        if self.activation is np.uint8:
            parts = F.pad(values.int(), (0, -depth % PART, 0, num_panels * PANEL - out_features))
            sums = parts.view(num_panels, PANEL, -1, PART).sum(3, dtype=torch.int32)
            firsts = -OFFSET * sums.transpose(1, 2).flatten().numpy()
            at = int(packed.firsts_at[i])
            packed.firsts[at : at + firsts.size] = firsts

    def rows(self, i: int, outputs: Array) -> Array:
        """Returns the weights [n, in_features] of these outputs of layer i, in fp32 as they came.

        Other precisions do not have them any more.
        """
        assert self.precision == "fp32"
        out_features, depth = self.shapes[i]
        num_panels, start = -(-out_features // PANEL), int(self.packed.starts[i])
        flat = self.packed.panels[start : start + num_panels * depth * PANEL]
        panels = flat.reshape(num_panels, depth, PANEL)
        return np.ascontiguousarray(panels[outputs // PANEL, :, outputs % PANEL])

    def run(self, layers: Sequence[int], num_rows: int) -> None:
        """Runs the products of these layers, one after the other, on rows that mean nothing.

        Nothing is computed between them: a step that needs them can't be faster.
        """
        depths = np.array([self.padded(depth) for _, depth in self.shapes], np.int64)
        longest, widest = max(depths), max(self.shapes[i][0] for i in layers)
        x = np.ones(num_rows * longest, self.activation)
        out = np.empty(num_rows * widest, np.float32)
        steps = np.ones((num_rows, num_parts(longest)), np.float32)
        threads = numba.get_num_threads()
        _multiply_all(
            threads, num_rows, x, steps, self.packed, np.array(layers, np.int64), depths, out
        )


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def num_parts(in_features: int) -> int:
    """Returns how many steps a row of activations has at most."""
    return -(-in_features // PART)


@compiled
def _sum_floats(x, steps, row0, rows, packed, i, p, sums):
    depth = x.shape[1]
    groups = depth // packed.group
    # Where a panel is passed over more than once, the next one comes from memory meanwhile.
    ahead = groups * PANEL * (rows > ROWS)
    for k in range(0, groups, _DEPTH):
        n = min(_DEPTH, groups - k)
        product(
            rows, PANEL, x.reshape(-1), row0 * depth + k * packed.group, depth,
            packed.panels, packed.starts[i] + (p * groups + k) * PANEL, 0, n * packed.group,
            sums, 0, PANEL, k, ahead,
        )  # fmt: skip


@compiled
def _sum_integers(x, steps, row0, rows, packed, i, p, sums):
    depth, stride = x.shape[1], steps.shape[1]
    step_product(
        rows, x.reshape(-1), row0 * depth, depth,
        packed.panels, packed.starts[i] + p * (depth // packed.group) * PANEL, depth, PART,
        packed.firsts, packed.firsts_at[i] + p * -(-depth // PART) * PANEL,
        steps.reshape(-1), row0 * stride, stride, sums, 0,
    )  # fmt: skip


def _sum(x, steps, row0, rows, packed, i, p, sums):
    """sums[:rows] = x[row0 : row0 + rows] @ panel p of layer i."""
    raise NotImplementedError("this is for compiled code")


@overload(_sum)
def _sum_of(x, steps, row0, rows, packed, i, p, sums):
    chosen = _sum_floats if x.dtype in (types.float32, types.uint16) else _sum_integers

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

    x is [rows, padded in_features] of what `narrow_row` gave, with `steps` [rows, any]; out is
    [rows, out_features or more]; `sums` is room for TALL * PANEL values of fp32.
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
    for thread in prange(num_threads):
        sums = np.empty(TALL * PANEL, np.float32)
        multiply_some(counters[0], thread, narrow, steps, packed, i, out, sums)


@compiled(parallel=True)
def _multiply_all(num_threads, rows, x, steps, packed, layers, depths, out):
    counters = counters_of(len(layers), num_threads)
    for thread in prange(num_threads):
        sums = np.empty(TALL * PANEL, np.float32)
        for n in range(len(layers)):
            i = layers[n]
            width, depth = packed.widths[i], depths[i]
            multiply_some(
                counters[n], thread, x[: rows * depth].reshape(rows, depth), steps, packed, i,
                out[: rows * width].reshape(rows, width), sums,
            )  # fmt: skip


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
            narrow = np.zeros((len(rows), packing.padded(self.in_features)), packing.activation)
        out = torch.empty(len(rows), self.out_features)
        steps = np.empty((len(rows), num_parts(self.in_features)), np.float32)
        threads = numba.get_num_threads()
        _multiply(threads, rows, narrow, steps, packing.packed, self.index, out.numpy())
        return out.view(*x.shape[:-1], self.out_features)


def packed_linear(weight: Tensor, bias: Tensor | None, precision: str = "fp32") -> PackedLinear:
    """Returns a linear layer of weight [out_features, in_features] on its own.

    Raises what `Packing` raises.
    """
    packing = Packing([(weight.shape[0], weight.shape[1])], precision)
    packing.fill(0, weight, bias)
    return PackedLinear(packing, 0)
