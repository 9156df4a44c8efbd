"""Parts of a frozen decoder over packed tokens [tokens, ...], with gradients to inputs alone.

Each keeps for its gradient what cannot be had again cheaply, and no more: weights are frozen, so
the input of a product is not needed.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

_MOST_QUERIES = 128  # of a sequence that attend at a time
_LEAST_FILLED = 0.75  # the shortest sequence of a group, as a share of the longest


class Product(NamedTuple):
    """A frozen linear layer: [outputs, inputs] in the dtype that it is computed in."""

    weight: Tensor
    bias: Tensor | None  # fp32

    @classmethod
    def of(cls, linear: nn.Linear, dtype: torch.dtype) -> "Product":
        """Returns the product of a layer; its weights are shared where they have that dtype."""
        bias = None if linear.bias is None else linear.bias.detach().float()
        return cls(linear.weight.detach().to(dtype), bias)


class Group(NamedTuple):
    """Neighbouring sequences of similar length, which attend in one product each."""

    tokens: slice  # of the packed tokens
    num_sequences: int
    length: int  # of the longest
    places: Tensor  # [tokens], where each is if all sequences had that length


def groups_of(lengths: Sequence[int]) -> list[Group]:
    """Returns the groups of sequences that are packed one behind the other."""
    groups: list[Group] = []
    start, members = 0, list[int]()
    for length, following in zip(lengths, (*lengths[1:], 0), strict=True):
        members.append(length)
        longest, shortest = max(*members, following), min(*members, following)
        if shortest < _LEAST_FILLED * longest:
            rows = [row * max(members) + torch.arange(n) for row, n in enumerate(members)]
            tokens = slice(start, start + sum(members))
            groups.append(Group(tokens, len(members), max(members), torch.cat(rows)))
            start, members = tokens.stop, []
    return groups


def products(x: Tensor, *each: Product) -> tuple[Tensor, ...]:
    """Returns the outputs, in the dtype of the weights, of several layers that have one input."""
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


def attended(q: Tensor, k: Tensor, v: Tensor, groups: Sequence[Group], scale: float) -> Tensor:
    """Returns causal attention inside each sequence, heads as they are: [tokens, heads, dim]."""
    outputs: Tensor = _Attended.apply(q, k, v, groups, scale)  # type: ignore[no-untyped-call]
    return outputs


class _Products(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, each: tuple[Product, ...]) -> tuple[Tensor, ...]:
        ctx.each, ctx.dtype = each, x.dtype
        outputs = []
        narrow = x.to(each[0].weight.dtype)
        for weight, bias in each:
            y = torch.mm(narrow, weight.t())
            outputs.append(y if bias is None else y.add_(bias))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total: Tensor | None = None
        for grad, (weight, _) in zip(grads, ctx.each, strict=True):
            if total is None:
                total = torch.mm(grad.to(weight.dtype), weight).to(ctx.dtype)
            elif weight.dtype == torch.float32:
                total.addmm_(grad, weight)
            else:
                total.add_(torch.mm(grad.to(weight.dtype), weight))
        assert total is not None
        return total, None


class _RmsNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        mean = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        factor = mean.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, factor)
        normed: Tensor = (x * factor).mul_(weight)
        return normed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, weight, factor = ctx.saved_tensors
        grad = grad * weight
        along = torch.linalg.vecdot(grad, x).unsqueeze(-1)  # what only changes the length of x
        along.mul_(factor**3).div_(x.shape[-1])
        return grad.mul_(factor).addcmul_(x, along, value=-1), None, None


class _Rotated(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, sin, -1), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    """Returns the two halves of each head as points of planes, turned by the angles."""
    turned = x * torch.cat((cos, cos), -1)
    (x1, x2), (y1, y2) = x.chunk(2, -1), turned.chunk(2, -1)
    y1.addcmul_(x2, sin, value=-direction)
    y2.addcmul_(x1, sin, value=direction)
    return turned


class _Gated(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward((grad * up).to(gate.dtype), gate), F.silu(gate).mul_(
            grad
        )


class _Attended(Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, groups: Sequence[Group], scale: float
    ) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.groups, ctx.scale, ctx.kept = groups, scale, []
        outputs = torch.empty_like(q)
        for group in groups:
            queries = _split(q, k, group)
            keys, values = (_split(x, k, group)[:, 0] for x in (k, v))
            attended = torch.empty_like(queries)
            for tile in _tiles(group.length):
                shares = _shares(queries[:, :, tile], keys[:, : tile.stop], scale)
                _fill(attended[:, :, tile], torch.bmm(shares, values[:, : tile.stop]))
                # Those of long sequences would be most of what a pass holds: computed again.
                ctx.kept.append(shares if group.length <= _MOST_QUERIES else None)
            outputs[group.tokens] = _joined(attended, group)
        return outputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        kept = iter(ctx.kept)
        for group in ctx.groups:
            queries, above = (_split(x, k, group) for x in (q, grad))
            keys, values = (_split(x, k, group)[:, 0] for x in (k, v))
            in_queries = torch.empty_like(queries)
            in_keys, in_values = torch.zeros_like(keys), torch.zeros_like(values)
            for tile in _tiles(group.length):
                asking, seen = queries[:, :, tile], keys[:, : tile.stop]
                shares = next(kept)
                if shares is None:
                    shares = _shares(asking, seen, ctx.scale)
                upper = above[:, :, tile].flatten(1, 2)
                in_values[:, : tile.stop].baddbmm_(shares.transpose(1, 2), upper)
                inner = torch.bmm(upper, values[:, : tile.stop].transpose(1, 2)).mul_(shares)
                inner.addcmul_(shares, inner.sum(-1, keepdim=True), value=-1).mul_(ctx.scale)
                _fill(in_queries[:, :, tile], torch.bmm(inner, seen))
                in_keys[:, : tile.stop].baddbmm_(inner.transpose(1, 2), asking.flatten(1, 2))
            for whole, part in ((dq, in_queries), (dk, in_keys), (dv, in_values)):
                whole[group.tokens] = _joined(part, group)
        return dq, dk, dv, None, None


def _tiles(length: int) -> list[slice]:
    """Returns the queries of a sequence in parts that attend at a time."""
    return [slice(i, min(i + _MOST_QUERIES, length)) for i in range(0, length, _MOST_QUERIES)]


def _split(x: Tensor, keys: Tensor, group: Group) -> Tensor:
    """Returns a group's heads with all sequences of one length, zeros behind the shorter ones.

    [tokens, heads, dim] becomes [sequences x heads of the keys, heads of x for each, length, dim].
    Causal attention never looks at the zeros.
    """
    rows = x[group.tokens]
    if group.num_sequences > 1:
        filled = x.new_zeros(group.num_sequences * group.length, *x.shape[1:])
        rows = filled.index_copy_(0, group.places, rows)
    heads = rows.view(group.num_sequences, group.length, keys.shape[1], -1, x.shape[2])
    return heads.permute(0, 2, 3, 1, 4).flatten(0, 1).contiguous()


def _joined(split: Tensor, group: Group) -> Tensor:
    """Returns [tokens, heads, dim] of what `_split` returned."""
    heads = split.view(group.num_sequences, -1, group.length, split.shape[-1]).transpose(1, 2)
    return heads.flatten(0, 1).index_select(0, group.places)


def _shares(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Returns how much each query takes of each key, up to its own: [.., all queries, keys]."""
    num_queries, num_keys = queries.shape[2], keys.shape[1]
    scores = torch.bmm(queries.flatten(1, 2), keys.transpose(1, 2)).mul_(scale)
    latest = scores.view(-1, num_queries, num_keys)[..., num_keys - num_queries :]
    latest += _future()[:num_queries, :num_queries]
    return scores.softmax(-1)


def _fill(part: Tensor, values: Tensor) -> None:
    part.copy_(values.view(part.shape))


@cache
def _future() -> Tensor:
    """Returns what bars a query from the keys behind it: [queries, keys] of 0 and -inf."""
    return torch.full((_MOST_QUERIES, _MOST_QUERIES), -torch.inf).triu_(1)
