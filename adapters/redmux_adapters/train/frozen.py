"""Parts of a frozen decoder over packed tokens [tokens, ...], with gradients to inputs alone.

Each keeps for its gradient what cannot be had again cheaply, and no more: weights are frozen, so
the input of a product is not needed. All is fp32 but the products, which have their weights' dtype.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

_MOST_QUERIES = 128  # of a sequence at a time; no more probabilities are held for each query


class Product(NamedTuple):
    """A frozen linear layer: [outputs, inputs] in the dtype that it is computed in."""

    weight: Tensor
    bias: Tensor | None  # fp32

    @classmethod
    def of(cls, linear: nn.Linear, dtype: torch.dtype) -> "Product":
        """Returns the product of a layer; its weights are shared where they have that dtype."""
        bias = None if linear.bias is None else linear.bias.detach().float()
        return cls(linear.weight.detach().to(dtype), bias)


class Tile(NamedTuple):
    """Queries of one sequence that attend together, and all that they may attend to."""

    queries: slice  # of the packed tokens
    keys: slice  # from the sequence's first token to the last query's own

    @property
    def num_queries(self) -> int:
        """Number of tokens that ask."""
        return int(self.queries.stop - self.queries.start)


def tiles_of(lengths: Sequence[int]) -> list[Tile]:
    """Returns the tiles of sequences that are packed one behind the other."""
    tiles, start = [], 0
    for length in lengths:
        end = start + length
        for first in range(start, end, _MOST_QUERIES):
            last = min(first + _MOST_QUERIES, end)
            tiles.append(Tile(slice(first, last), slice(start, last)))
        start = end
    return tiles


def products(x: Tensor, *each: Product) -> tuple[Tensor, ...]:
    """Returns the outputs of several layers that have one input."""
    outputs: tuple[Tensor, ...] = _Products.apply(x, each)  # type: ignore[no-untyped-call]
    return outputs


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Returns x / sqrt(mean(x^2) + eps) * weight, over the last axis."""
    normed: Tensor = _RmsNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return normed


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Returns heads [tokens, heads, dim] rotated by their positions [tokens, 1, dim / 2]."""
    turned: Tensor = _Rotated.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return turned


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """Returns silu(gate) * up."""
    product: Tensor = _Gated.apply(gate, up)  # type: ignore[no-untyped-call]
    return product


def attended(q: Tensor, k: Tensor, v: Tensor, tiles: Sequence[Tile], scale: float) -> Tensor:
    """Returns causal attention inside each sequence, heads as they are: [tokens, heads, dim]."""
    outputs: Tensor = _Attended.apply(q, k, v, tiles, scale)  # type: ignore[no-untyped-call]
    return outputs


class _Products(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, each: tuple[Product, ...]) -> tuple[Tensor, ...]:  # type: ignore[override]
        ctx.each = each
        outputs = []
        narrow = x.to(each[0].weight.dtype)
        for weight, bias in each:
            y = torch.mm(narrow, weight.t()).float()
            outputs.append(y if bias is None else y.add_(bias))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        total: Tensor | None = None
        for grad, (weight, _) in zip(grads, ctx.each, strict=True):
            if total is None:
                total = torch.mm(grad.to(weight.dtype), weight).float()
            elif weight.dtype == torch.float32:
                total.addmm_(grad, weight)
            else:
                total.add_(torch.mm(grad.to(weight.dtype), weight))
        assert total is not None
        return total, None


class _RmsNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        mean = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        factor = mean.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, factor)
        return (x * factor).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        x, weight, factor = ctx.saved_tensors
        grad = grad * weight
        along = torch.linalg.vecdot(grad, x).unsqueeze(-1)  # what only changes the length of x
        along.mul_(factor**3).div_(x.shape[-1])
        return grad.mul_(factor).addcmul_(x, along, value=-1), None, None


class _Rotated(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _turn(grad, *ctx.saved_tensors, -1), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    """Returns the two halves of each head as points of planes, turned by the angles."""
    turned = x * torch.cat((cos, cos), -1)
    (x1, x2), (y1, y2) = x.chunk(2, -1), turned.chunk(2, -1)
    y1.addcmul_(x2, sin, value=-direction)
    y2.addcmul_(x1, sin, value=direction)
    return turned


class _Gated(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


class _Attended(Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, tiles: Sequence[Tile], scale: float
    ) -> Tensor:
        num_groups = k.shape[1]
        ctx.save_for_backward(q, k, v)
        ctx.tiles, ctx.scale, ctx.kept = tiles, scale, []
        outputs = torch.empty_like(q)
        for tile in tiles:
            keys = k[tile.keys].transpose(0, 1)
            queries = _grouped(q[tile.queries], num_groups)
            shares = _shares(queries, keys, scale, tile.num_queries)
            _spread(torch.bmm(shares, v[tile.keys].transpose(0, 1)), outputs[tile.queries])
            # Those of long sequences would be most of what a pass holds, and are computed again.
            is_whole = tile.queries == tile.keys
            ctx.kept.append(shares if is_whole else None)
        return outputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for tile, kept in zip(ctx.tiles, ctx.kept, strict=True):
            keys, values = k[tile.keys].transpose(0, 1), v[tile.keys].transpose(0, 1)
            queries = _grouped(q[tile.queries], k.shape[1])
            shares = kept
            if shares is None:
                shares = _shares(queries, keys, ctx.scale, tile.num_queries)
            above = _grouped(grad[tile.queries], k.shape[1])
            dv[tile.keys] += torch.bmm(shares.transpose(1, 2), above).transpose(0, 1)
            inner = torch.bmm(above, values.transpose(1, 2)).mul_(shares)
            inner.addcmul_(shares, inner.sum(-1, keepdim=True), value=-1).mul_(ctx.scale)
            _spread(torch.bmm(inner, keys), dq[tile.queries])
            dk[tile.keys] += torch.bmm(inner.transpose(1, 2), queries).transpose(0, 1)
        return dq, dk, dv, None, None


def _grouped(heads: Tensor, num_groups: int) -> Tensor:
    """Returns [groups, heads of a group x queries, dim] of [queries, heads, dim]."""
    num_queries, num_heads, dim = heads.shape
    split = heads.view(num_queries, num_groups, num_heads // num_groups, dim)
    return split.permute(1, 2, 0, 3).reshape(num_groups, -1, dim)


def _spread(grouped: Tensor, heads: Tensor) -> None:
    """Fills [queries, heads, dim] with what `_grouped` would make of it."""
    num_queries, _, dim = heads.shape
    split = grouped.view(len(grouped), -1, num_queries, dim).permute(2, 0, 1, 3)
    heads.view(split.shape).copy_(split)


def _shares(queries: Tensor, keys: Tensor, scale: float, num_queries: int) -> Tensor:
    """Returns how much of each key a query takes: [groups, heads of a group x queries, keys]."""
    scores = torch.bmm(queries, keys.transpose(1, 2)).mul_(scale)
    num_keys = keys.shape[1]
    latest = scores.view(-1, num_queries, num_keys)[..., num_keys - num_queries :]
    latest += _future()[:num_queries, :num_queries]
    return scores.softmax(-1)


@cache
def _future() -> Tensor:
    """Returns what bars a query from the keys behind it: [queries, keys] of 0 and -inf."""
    return torch.full((_MOST_QUERIES, _MOST_QUERIES), -torch.inf).triu_(1)
