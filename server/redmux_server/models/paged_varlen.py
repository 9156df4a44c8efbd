"""Paged attention by torch.nn.attention.varlen: FlashAttention 2 as torch brings it."""

import torch
from torch import Tensor

from redmux_server.models.paged_cache import AttentionRule
from redmux_server.models.paged_step import PagedStep
from redmux_server.models.paged_torch import TorchAttention


class VarlenAttention:
    """One call of `varlen_attn` per layer, decodes and prefills together.

    Constraints of torch 2.13 that this keeps: pages are multiples of 256; `num_splits=1`, as split
    keys leave rows unwritten (pytorch#194167); `varlen_attn` and not `varlen_attn_out`, because
    with grouped queries of one token FlashAttention 2 writes into a copy of `out`. It has no soft
    cap, so layers with one go through TorchAttention.
    """

    block_size = 256
    reads_blocks = True
    can_graph = True

    def __init__(self, dtype: torch.dtype) -> None:
        """Raises ImportError without the function and ValueError for a dtype it cannot do."""
        from torch.nn.attention.varlen import varlen_attn

        if dtype not in (torch.float16, torch.bfloat16):
            raise ValueError(f"it has no {str(dtype).removeprefix('torch.')}")
        self._call = varlen_attn
        self._capped = TorchAttention()

    def plan(self, step: PagedStep) -> None:
        """See PagedAttention.plan: nothing to prepare."""

    def __call__(
        self, step: PagedStep, rule: AttentionRule, query: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        """See PagedAttention."""
        if rule.softcap:
            return self._capped(step, rule, query, keys, values)
        if rule.window:
            window = (rule.window - 1, 0)  # keys to the left of a row's own, keys to the right
        elif step.max_count == 1:
            window = (-1, -1)  # the newest token sees every key; so heads of a group share loads
        else:
            window = (-1, 0)
        out = self._call(
            query,
            keys,
            values,
            step.starts,
            step.key_starts,
            step.max_count,
            step.max_keys,
            scale=rule.scale,
            window_size=window,
            enable_gqa=True,
            seqused_k=step.key_counts,
            block_table=step.blocks,
            num_splits=1,
        )
        assert isinstance(out, Tensor)
        return out
