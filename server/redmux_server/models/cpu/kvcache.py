"""The paged cache of a CPU, whose attention has the same bits in any batch."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from redmux_server.device import name_of
from redmux_server.models.cpu.aligned import copied, give_back, zeros
from redmux_server.models.cpu.paged_attention import (
    TILE,
    PagedAttention,
    StepIndex,
    new_blocks,
)
from redmux_server.models.cpu.vector import Array
from redmux_server.models.kvcache import BLOCK, KVCache, LayerShape, Segment

_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}


class NumbaKVCache(KVCache):
    """Cache and attention for fp32 on the CPU, exact in any batch: see `paged_attention`."""

    def __init__(
        self, shapes: Sequence[LayerShape], num_blocks: int, dtype: torch.dtype = torch.float32
    ) -> None:
        """`dtype` is what keys and values are rounded to, float32 or bfloat16.

        What is computed with them is fp32.
        """
        super().__init__(num_blocks)
        self.dtype = dtype
        self._shapes = shapes
        self.index: StepIndex | None = None
        # Layers of one shape lie in one array, neighbours of equal shape side by side.
        self.stacks: list[tuple[Array, Array]] = []
        self.paged: list[PagedAttention] = []
        for shape, group in itertools.groupby(shapes):
            keys, values = new_blocks(
                len(list(group)), num_blocks, shape.num_kv_heads, shape.head_dim, name_of(dtype)
            )
            self.stacks.append((keys, values))
            self.paged += [
                PagedAttention(shape.num_heads, shape.num_kv_heads, shape.head_dim, *layer)
                for layer in zip(keys, values, strict=True)
            ]
        self.layers = [_NumbaLayer(self, paged) for paged in self.paged]

    def exact(self, num_blocks: int) -> "NumbaKVCache":
        """Returns a cache that rounds nothing: itself, or another one of `num_blocks` blocks."""
        return self if self.dtype == torch.float32 else NumbaKVCache(self._shapes, num_blocks)

    @contextmanager
    def step(self, segments: Sequence[Segment]) -> Iterator[None]:
        """Builds the index that all layers of this step share."""
        self.index = step_index(segments)
        try:
            with super().step(segments):
                yield
        finally:
            self.index = None

    def give_back(self) -> None:
        """Forgets all keys and values; the system has their memory until it is written again."""
        for keys, values in self.stacks:
            give_back(keys)
            give_back(values)

    def poison(self, blocks: Sequence[int], value: float) -> None:
        """See KVCache.poison."""
        poison = torch.tensor(value, dtype=self.dtype).view(_BITS[self.dtype]).numpy()
        for layer in self.paged:
            for array in (layer.keys, layer.values):
                array.view(poison.dtype)[list(blocks)] = poison


def step_index(segments: Sequence[Segment]) -> StepIndex:
    """Returns where the tokens of these segments go and what they attend to."""
    count = np.array([s.count for s in segments])
    first = np.array([s.position for s in segments])
    table = zeros((len(segments), max(len(s.blocks) for s in segments)), np.int32)
    for i, s in enumerate(segments):
        table[i, : len(s.blocks)] = s.blocks
    request = np.repeat(np.arange(len(segments)), count)
    token = np.arange(len(request))
    offset = token - (np.cumsum(count) - count)[request]
    position = first[request] + offset
    places = np.stack((table[request, position // BLOCK], position % BLOCK)).astype(np.int32)
    starts = offset % TILE == 0
    owner, begin = request[starts], position[starts]
    rows = np.minimum(TILE, (first + count)[owner] - begin)
    tiles = np.stack((owner, token[starts], rows, begin)).astype(np.int32)
    return StepIndex(copied(places), table, copied(tiles))


class _NumbaLayer:
    def __init__(self, cache: NumbaKVCache, paged: PagedAttention) -> None:
        self._cache = cache
        self._paged = paged

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int, softcap: float
    ) -> Tensor:
        q, k, v = (x[0].transpose(0, 1).contiguous().numpy() for x in (query, key, value))
        out = torch.empty(q.shape)
        assert self._cache.index is not None, "attention is called outside of a step"
        self._paged.attend(q, k, v, out.numpy(), self._cache.index, scale, window, softcap)
        return out[None]
