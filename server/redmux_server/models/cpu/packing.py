"""The weights of frozen linear layers, laid out as products read them."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from redmux.errors import FailedPreconditionError
from redmux_server.models.cpu import aligned
from redmux_server.models.cpu.arithmetic import HAS_AVX2, HAS_BF16, HAS_VNNI, PANEL
from redmux_server.models.cpu.block_kernel import BLOCK, block_bytes
from redmux_server.models.cpu.block_weights import fill_panels
from redmux_server.models.cpu.narrow import LEVELS, OFFSET, PART, SMALLEST_STEP
from redmux_server.models.cpu.tile_permission import why_no_tiles
from redmux_server.models.cpu.tiles import configuration
from redmux_server.models.cpu.vector import Array


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
    bits: Array  # int64 [layers], of a weight in blocks; else 0
    # `tiles.configuration` where products use tiles, which compiled code tells by its type.
    tiles: Array | None


class _Layout(NamedTuple):
    activation: type  # what `narrow_row` rounds to
    lane: type
    group: int
    uses_tiles: bool


def _layout(precision: str) -> _Layout:
    """Raises FailedPreconditionError for a precision that this CPU has no products of."""
    if precision == "fp32":
        return _Layout(np.float32, np.float32, 1, False)
    if precision == "int8" and HAS_VNNI:
        return _Layout(np.uint8, np.int32, 4, why_no_tiles() is None)
    if precision == "int8" and HAS_AVX2:
        return _Layout(np.int16, np.int16, 2, False)
    if precision == "int4" and HAS_AVX2:
        return _Layout(np.int8, np.uint8, 1, False)
    if precision == "bf16" and HAS_BF16:
        return _Layout(np.uint16, np.uint32, 2, why_no_tiles() is None)
    needed = {"int4": "AVX2", "int8": "AVX2", "bf16": "AVX-512 BF16"}[precision]
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

    Where a process may use tiles, bf16 is multiplied in them whatever the number of rows, which
    adds in another order than vectors do; int8 where that is faster, with the same bits.

    int8 weights have one step for each output channel and activations one for every PART of a row,
    where dynamic quantisation usually takes one for a whole tensor and one tenant's outlier ruins
    its neighbours.

    int4 weights have a step and an origin for every BLOCK inputs, and activations of 8 bits a step
    for as many; the head has 8 bits, since a logit shows each rounding of its weights.
    """

    def __init__(
        self, shapes: Sequence[tuple[int, int]], precision: str = "fp32", head: int | None = None
    ) -> None:
        """`shapes` are (out_features, in_features), `head` is the layer that gives logits, if any.

        Raises FailedPreconditionError where this CPU has no such products.
        """
        layout = _layout(precision)
        self.shapes = shapes
        self.precision = precision
        self.activation = layout.activation
        self.num_exact = 0  # layers of int4 that hold their weights as they came
        bits = [0] * len(shapes)
        if precision == "int4":
            bits = [8 if i == head else 4 for i in range(len(shapes))]
        lanes = [
            self._num_lanes(out, depth, layout.group, width)
            for (out, depth), width in zip(shapes, bits, strict=True)
        ]
        widths = [_round_up(out, PANEL) for out, _ in shapes]
        has_firsts = precision == "int8"
        firsts = [w * _num_parts(depth) for w, (_, depth) in zip(widths, shapes, strict=True)]
        self.packed = Packed(
            panels=aligned.zeros(sum(lanes), layout.lane),
            starts=aligned.copied(np.cumsum([0, *lanes])[:-1]),
            columns=aligned.copied(np.cumsum([0, *widths])[:-1]),
            widths=aligned.copied(np.array([out for out, _ in shapes], np.int64)),
            bias=aligned.zeros(sum(widths), np.float32),
            scale=aligned.copied(np.ones(sum(widths), np.float32)),
            firsts=aligned.zeros(sum(firsts) * has_firsts, np.int32),
            firsts_at=aligned.copied(np.cumsum([0, *firsts])[:-1]),
            group=layout.group,
            bits=aligned.copied(np.array(bits, np.int64)),
            tiles=configuration() if layout.uses_tiles else None,
        )

    def padded(self, in_features: int) -> int:
        """Returns how many values a row has that products take: whole lines where it is rounded."""
        if self.activation is np.float32:
            return in_features
        return _round_up(in_features, aligned.LINE // np.dtype(self.activation).itemsize)

    def num_steps(self, in_features: int) -> int:
        """Returns how many values `narrow_row` leaves beside a row at most."""
        if self.precision == "int4":
            return 2 * self.padded(in_features) // BLOCK
        return _num_parts(in_features)

    def _num_lanes(self, out_features: int, in_features: int, group: int, bits: int) -> int:
        num_panels, depth = -(-out_features // PANEL), self.padded(in_features)
        if bits:
            return num_panels * (depth // BLOCK) * block_bytes(bits)
        return num_panels * PANEL * depth // group

    def fill(self, i: int, weight: Tensor, bias: Tensor | None) -> None:
        """Takes layer i's weight [out_features, in_features] and bias [out_features]."""
        out_features, in_features = self.shapes[i]
        packed, depth = self.packed, self.padded(in_features)
        column = int(packed.columns[i])
        some = slice(column, column + out_features)
        if bias is not None:
            packed.bias[some] = bias.float().numpy()
        if self.precision == "int4":
            self._fill_blocks(i, weight)
            return
        num_panels, start = -(-out_features // PANEL), int(packed.starts[i])
        values = weight.float()
        if self.precision == "int8":
            steps = (values.abs().amax(1) / LEVELS).clamp_min(float(SMALLEST_STEP))
            values = (values / steps[:, None]).round_().to(torch.int8)
            packed.scale[some] = steps.numpy()
        elif self.precision == "bf16":
            values = values.to(torch.bfloat16).view(torch.int16)
        if depth > in_features:
            values = F.pad(values, (0, depth - in_features))
        lanes = packed.panels[start : start + num_panels * depth // packed.group * PANEL]
        panels = torch.from_numpy(lanes.view(values.numpy().dtype))
        panels = panels.view(num_panels, -1, PANEL, packed.group)
        # Straight into place: memory that a process has not used yet is slow to come.
        rows = values.reshape(out_features, -1, packed.group)
        whole, rest = divmod(out_features, PANEL)
        panels[:whole] = rows[: whole * PANEL].view(whole, PANEL, *rows.shape[1:]).transpose(1, 2)
        panels[whole:, :, :rest] = rows[whole * PANEL :].transpose(0, 1)
        if self.activation is np.uint8:
            parts = F.pad(values.int(), (0, -depth % PART, 0, num_panels * PANEL - out_features))
            sums = parts.view(num_panels, PANEL, -1, PART).sum(3, dtype=torch.int32)
            firsts = -OFFSET * sums.transpose(1, 2).flatten().numpy()
            at = int(packed.firsts_at[i])
            packed.firsts[at : at + firsts.size] = firsts

    def _fill_blocks(self, i: int, weight: Tensor) -> None:
        packed, out_features = self.packed, len(weight)
        bits, column, start = (int(x[i]) for x in (packed.bits, packed.columns, packed.starts))
        num_panels, num_blocks = -(-out_features // PANEL), self.padded(weight.shape[1]) // BLOCK
        shape = (num_panels, num_blocks, block_bytes(bits))
        panels = packed.panels[start : start + math.prod(shape)].reshape(shape)
        scale = packed.scale[column : column + out_features]
        self.num_exact += fill_panels(panels, scale, weight, bits)

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


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _num_parts(in_features: int) -> int:
    """Returns how many steps a row of activations has at most."""
    return -(-in_features // PART)
