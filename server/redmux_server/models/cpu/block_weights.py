"""Weights rounded to levels of 4 or 8 bits with a step and an origin for every block of inputs.

Files of 4-bit weights hold such grids themselves: what lies on one with a step and an origin of
fp16 is taken as it is, like all of GGUF's Q4_0 and Q4_1, and in 8 bits Q8_0.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from redmux_server.models.cpu.arithmetic import PANEL
from redmux_server.models.cpu.block_kernel import BLOCK, line_bytes
from redmux_server.models.cpu.vector import Array

_CHUNK = 64 * PANEL  # rows that are rounded at a time, so that little memory is used on the way
_FEW = 64  # blocks that tell whether those of a layer lie on grids
# Mean square of errors to that of a block's range: with 16 even steps of it, it would be 4e-4.
_ON_GRID = 1e-5
_SHRUNK = (0.95, 0.9, 0.85)  # of a range: its outermost weights may cost more than they give


class Blocks(NamedTuple):
    """Blocks of weights as origin + step * level."""

    levels: Tensor  # [blocks, BLOCK], whole numbers
    steps: Tensor  # fp16 [blocks]
    origins: Tensor  # fp16 [blocks]
    errors: Tensor  # [blocks], sums of squares

    def values(self) -> Tensor:
        """Returns the weights [blocks, BLOCK] in fp32."""
        return self.origins.float()[:, None] + self.steps.float()[:, None] * self.levels


def fill_panels(panels: Array, scale: Array, weight: Tensor, bits: int) -> bool:
    """Writes weight [out_features, in_features] into panels [panels, blocks, bytes of a block].

    `scale` [out_features] gets what outputs are to be multiplied with. Returns whether the panels
    hold every weight as it is.
    """
    num_blocks = panels.shape[1]
    target, scales = torch.from_numpy(panels), torch.from_numpy(scale)
    end = BLOCK // 4 * line_bytes(bits)
    is_exact = True
    for first in range(0, len(weight), _CHUNK):
        rows = weight[first : first + _CHUNK].float()
        factors = _factors(rows)
        scales[first : first + len(rows)] = factors
        rows = F.pad(rows / factors[:, None], (0, num_blocks * BLOCK - rows.shape[1]))
        found = rounded(rows.reshape(-1, BLOCK), bits)
        is_exact &= not found.errors.any()
        count = -(-len(rows) // PANEL)
        some = target[first // PANEL : first // PANEL + count]

        def by_panel(x: Tensor, count: int = count) -> Tensor:
            """Returns x [rows * blocks, any] as [panels, blocks, PANEL, any]."""
            x = x.view(-1, num_blocks, x.shape[-1])
            x = F.pad(x, (0, 0, 0, 0, 0, count * PANEL - len(x)))
            return x.view(count, PANEL, num_blocks, -1).transpose(1, 2)

        levels = by_panel(found.levels.to(torch.uint8))
        lines = levels.reshape(count, num_blocks, PANEL, -1, 4).transpose(2, 3)
        if bits == 4:
            low, high = lines[..., : PANEL // 2, :], lines[..., PANEL // 2 :, :]
            lines = low | high << 4
        some[:, :, :end] = lines.flatten(2)
        for part, values in enumerate((found.steps, found.origins)):
            at = end + 2 * PANEL * part
            columns = by_panel(values[:, None])[..., 0].contiguous()
            some[:, :, at : at + 2 * PANEL] = columns.view(torch.uint8)
    return is_exact


def is_on_grids(model: nn.Module) -> bool:
    """Whether some weights of every linear layer but the head have 4 bits as they are."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    return len(linears) > 0 and all(_are_on_grids(linear.weight.data[:_FEW]) for linear in linears)


def _are_on_grids(weight: Tensor) -> bool:
    if weight.shape[1] % BLOCK:
        return False
    rows = weight.float()
    blocks = (rows / _factors(rows)[:, None]).view(-1, BLOCK)
    return not rounded(blocks, 4).errors.any()


def _factors(rows: Tensor) -> Tensor:
    """Returns the power of two for each row by which its blocks make the most of fp16's range.

    Steps are at most a quarter of the largest weight and origins at most about that, so that what
    a file has in fp16 stays exact.
    """
    exponents = torch.frexp(rows.abs().amax(1)).exponent
    return torch.ldexp(torch.ones(len(rows)), (exponents - 14).clamp_min(-120))


def rounded(blocks: Tensor, bits: int) -> Blocks:
    """Returns blocks [blocks, BLOCK] of fp32, magnitudes up to 2**14, rounded."""
    if bits == 8:
        steps = blocks.abs().amax(1) / 127
        return _on(blocks, -128 * steps.half().float(), steps, 255)
    low, high = blocks.aminmax(dim=1)
    found = _on(blocks, low, (high - low) / 15, 15)
    left = found.errors.nonzero()[:, 0]
    if len(left):
        some = left[:: -(-len(left) // _FEW)]
        few = _closest(blocks[some], _take(found, some), on_grid=True)
        share = few.errors / (BLOCK * (high - low)[some].square())
        are_on_grids = bool(share.median() <= _ON_GRID)
        better = _closest(blocks[left], _take(found, left), are_on_grids)
        for values, new in zip(found, better, strict=True):
            values[left] = new
    return found


def _closest(blocks: Tensor, found: Blocks, on_grid: bool) -> Blocks:
    """Returns the best of `found` and of other grids, those of files with 4 bits or narrower ones.

    A file's block need not have its lowest or highest level, and its step may be negative.
    """
    low, high = blocks.aminmax(dim=1)
    span = high - low
    if on_grid:
        grids = [(low, span / k) for k in range(14, 0, -1)]
        grids += [(high, -span / k) for k in range(15, 0, -1)]
    else:
        grids = [(low + span * (1 - f) / 2, span * f / 15) for f in _SHRUNK]
    for origin, step in grids:
        other = _on(blocks, origin, step, 15)
        is_better = other.errors < found.errors
        found = Blocks(*(
            torch.where(is_better.view(-1, *[1] * (old.dim() - 1)), new, old)
            for old, new in zip(found, other, strict=True)
        ))  # fmt: skip
    return found


def _take(found: Blocks, which: Tensor) -> Blocks:
    return Blocks(*(values[which] for values in found))


def _on(blocks: Tensor, origins: Tensor, steps: Tensor, highest: int) -> Blocks:
    """Returns blocks on these grids, whose steps and origins are rounded to fp16 first."""
    steps, origins = steps.half(), origins.half()
    inverse = torch.where(steps == 0, 0, 1 / steps.float())
    levels = ((blocks - origins.float()[:, None]) * inverse[:, None]).round_().clamp_(0, highest)
    found = Blocks(levels, steps, origins, steps)
    return found._replace(errors=(found.values() - blocks).square_().sum(1))
