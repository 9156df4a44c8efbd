"""PagedKVCache: keys and values in pages on the device, and what an attention library must do."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from redmux_server.models.cuda.paged_step import HostIndex, PagedStep, to_device
from redmux_server.models.kvcache import KVCache, LayerShape, Segment


@dataclass(frozen=True, slots=True)
class AttentionRule:
    """All that a call of attention depends on beside its tensors."""

    shape: LayerShape
    scale: float
    window: int  # visible keys, 0 for all
    softcap: float  # 0 for none


class PagedAttention(Protocol):
    """Attention over pages [blocks, block_size, kv_heads, head_dim], by some implementation."""

    block_size: int
    can_graph: bool  # whether its calls may be captured in a CUDA graph

    def __call__(
        self, step: PagedStep, rule: AttentionRule, query: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        """Takes query [tokens, heads, head_dim], returns the same shape.

        The step's own keys are in the cache already. Nothing that a request does not see may
        reach its rows, not even a NaN in the unwritten rest of its last page.
        """


class PagedKVCache(KVCache):
    """Keys and values as [blocks + 1, block_size, kv_heads, head_dim] of every layer.

    One more block than the pool hands out: the dummy block, where the padded rows of a captured
    decode step read and write. Zeroed once; never reused by position, so what a block held before
    is seen by nobody.
    """

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        num_blocks: int,
        attention: PagedAttention,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(num_blocks)
        self.block_size = attention.block_size
        self.dummy_block = num_blocks
        self.attention = attention
        self.current: PagedStep | None = None
        self._device = device
        self.layers: Sequence[PagedLayer] = [
            PagedLayer(self, shape, device, dtype) for shape in shapes
        ]

    @contextmanager
    def step(self, segments: Sequence[Segment]) -> Iterator[None]:
        """See KVCache.step."""
        host = HostIndex.of(segments, self.block_size)
        step = PagedStep.of(host, to_device(host.arrays(), self._device))
        with super().step(segments), self.use(step):
            yield

    @contextmanager
    def use(self, step: PagedStep) -> Iterator[None]:
        """Makes every layer work on this step, which is planned already, inside the block."""
        self.current = step
        try:
            yield
        finally:
            self.current = None

    def poison(self, blocks: Sequence[int], value: float) -> None:
        """See KVCache.poison."""
        for layer in self.layers:
            layer.keys[list(blocks)] = value
            layer.values[list(blocks)] = value


class PagedLayer:
    """The pages of one layer, and its attention as transformers calls it."""

    def __init__(
        self, cache: PagedKVCache, shape: LayerShape, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._cache = cache
        self.shape = shape
        pages = (cache.num_blocks + 1, cache.block_size, shape.num_kv_heads, shape.head_dim)
        self.keys = torch.zeros(pages, device=device, dtype=dtype)
        self.values = torch.zeros(pages, device=device, dtype=dtype)

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int, softcap: float
    ) -> Tensor:
        """See LayerAttention."""
        step = self._cache.current
        assert step is not None, "attention outside of a step"
        for pages, fresh in ((self.keys, key), (self.values, value)):
            pages.flatten(0, 1).index_copy_(0, step.slots, fresh[0].transpose(0, 1))
        rule = AttentionRule(self.shape, scale, window, softcap)
        q = query[0].transpose(0, 1).contiguous()  # [tokens, heads, head_dim]
        return self._cache.attention(step, rule, q, self.keys, self.values)[None]
