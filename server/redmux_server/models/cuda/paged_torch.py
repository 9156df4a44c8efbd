"""Paged attention in plain torch: any device, any dtype, nothing to install."""

import torch
import torch.nn.functional as F
from torch import Tensor

from redmux_server.models.cuda.paged_cache import AttentionRule
from redmux_server.models.cuda.paged_step import PagedStep


class TorchAttention:
    """Gathers pages by the block table and runs torch's scaled_dot_product_attention.

    All decodes of a step are one call, padded to the longest; a prefill is one call each. What a
    row does not see is replaced by zeros before the product, because a weight of zero times a NaN
    that somebody left in a page is NaN.
    """

    block_size = 32
    # It could be captured, but a static shape means gathering the longest context for every row.
    can_graph = False

    def __call__(
        self, step: PagedStep, rule: AttentionRule, query: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        """See PagedAttention."""
        out = torch.empty_like(query)
        n = step.host.num_decodes
        if n:
            out[:n] = _decode(step, n, rule, query[:n], keys, values)
        start = n
        for i in range(n, len(step.host.counts)):
            stop = start + int(step.host.counts[i])
            out[start:stop] = _prefill(step, i, rule, query[start:stop], keys, values)
            start = stop
        return out


def _decode(
    step: PagedStep, n: int, rule: AttentionRule, query: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """Attention of the first n requests, one query row each."""
    longest = step.max_keys if step.is_static else int(step.host.key_counts[:n].max())
    table = step.blocks[:n, : -(-longest // keys.shape[1])]
    positions = torch.arange(table.shape[1] * keys.shape[1], device=query.device)
    counts = step.key_counts[:n, None]
    visible = positions < counts  # [n, positions]
    if rule.window:
        visible &= positions >= counts - rule.window
    k, v = (_gather(pages, table) for pages in (keys, values))
    # The heads that share a KV head are the rows of one product.
    q = query.view(n, rule.shape.num_kv_heads, -1, query.shape[2])
    return _attend(q, k, v, visible[:, None], visible, rule).reshape(query.shape)


def _prefill(
    step: PagedStep, i: int, rule: AttentionRule, query: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """Attention of the i-th request's chunk: its last `count` positions over all of its keys."""
    stop = int(step.host.key_counts[i])
    count, _, head_dim = query.shape
    table = step.blocks[i : i + 1, : -(-stop // keys.shape[1])]
    positions = torch.arange(table.shape[1] * keys.shape[1], device=query.device)
    rows = torch.arange(stop - count, stop, device=query.device)[:, None]
    visible = positions <= rows  # [count, positions]
    seen = positions < stop
    if rule.window:
        visible &= positions > rows - rule.window
        seen &= positions > stop - count - rule.window
    k, v = (_gather(pages, table) for pages in (keys, values))
    num_kv_heads = rule.shape.num_kv_heads
    group = rule.shape.num_heads // num_kv_heads
    q = query.view(count, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
    out = _attend(q.reshape(1, num_kv_heads, -1, head_dim), k, v, visible.repeat(group, 1)[None],
                  seen[None], rule)  # fmt: skip
    return out.view(num_kv_heads, group, count, head_dim).permute(2, 0, 1, 3).reshape(query.shape)


def _gather(pages: Tensor, table: Tensor) -> Tensor:
    """Returns [requests, kv_heads, positions, head_dim] of the pages in `table`."""
    rows = pages.index_select(0, table.flatten())
    return rows.view(table.shape[0], -1, *pages.shape[2:]).transpose(1, 2)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, seen: Tensor, rule: AttentionRule
) -> Tensor:
    """Attention of q [n, kv_heads, rows, head_dim] over k, v [n, kv_heads, positions, head_dim].

    visible: [n, 1 or rows, positions]; seen: [n, positions], visible to any row of the request.
    """
    unseen = ~seen[:, None, :, None]
    k, v = k.masked_fill(unseen, 0), v.masked_fill(unseen, 0)
    mask = visible[:, None].expand(-1, -1, q.shape[2], -1)
    if not rule.softcap:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=rule.scale)
    scores = rule.softcap * torch.tanh((q @ k.mT).float() * (rule.scale / rule.softcap))
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return weights.to(v.dtype) @ v
