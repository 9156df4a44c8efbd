"""The paged key/value cache of every layer, and the attention that reads and writes it."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from redmux_server.models.paged_attention import (
    BLOCK,
    TILE,
    PagedAttention,
    StepIndex,
    new_blocks,
)
from redmux_server.models.vector import Array


@dataclass(frozen=True, slots=True)
class Segment:
    """The tokens of one request in one step: rows [start, start + count) of the packed batch."""

    start: int
    count: int
    position: int  # of the first of these tokens within its request
    blocks: Sequence[int]  # cache blocks of the request, in order of position


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What the cache must know of one attention module."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


class LayerAttention(Protocol):
    """Attention of one layer over the cache, for the step that is entered."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int, softcap: float
    ) -> Tensor:
        """Takes [1, heads, tokens, head_dim] and returns [1, tokens, heads, head_dim]."""


class KVCache:
    """Keys and values of `num_blocks` blocks for every layer.

    Written and read by the engine thread only. Memory is committed as blocks are first used.
    """

    layers: Sequence[LayerAttention]
    block_size: int = BLOCK  # tokens in a block

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.segments: Sequence[Segment] = ()

    @contextmanager
    def step(self, segments: Sequence[Segment]) -> Iterator[None]:
        """Makes the attention of every layer work on these segments inside the block."""
        self.segments = segments
        try:
            yield
        finally:
            self.segments = ()

    def poison(self, blocks: Sequence[int], value: float) -> None:
        """Overwrites blocks, so that a test can prove that nobody reads what is not theirs."""
        raise NotImplementedError


class NumbaKVCache(KVCache):
    """Cache and attention for fp32 on the CPU, exact in any batch: see `paged_attention`."""

    def __init__(self, shapes: Sequence[LayerShape], num_blocks: int) -> None:
        super().__init__(num_blocks)
        self.index: StepIndex | None = None
        # Layers of one shape lie in one array, neighbours of equal shape side by side.
        self.stacks: list[tuple[Array, Array]] = []
        self.paged: list[PagedAttention] = []
        for shape, group in itertools.groupby(shapes):
            keys, values = new_blocks(
                len(list(group)), num_blocks, shape.num_kv_heads, shape.head_dim
            )
            self.stacks.append((keys, values))
            self.paged += [
                PagedAttention(shape.num_heads, shape.num_kv_heads, shape.head_dim, *layer)
                for layer in zip(keys, values, strict=True)
            ]
        self.layers = [_NumbaLayer(self, paged) for paged in self.paged]

    @contextmanager
    def step(self, segments: Sequence[Segment]) -> Iterator[None]:
        """Builds the index that all layers of this step share."""
        self.index = step_index(segments)
        try:
            with super().step(segments):
                yield
        finally:
            self.index = None

    def poison(self, blocks: Sequence[int], value: float) -> None:
        """See KVCache.poison."""
        for layer in self.paged:
            layer.keys[list(blocks)] = value
            layer.values[list(blocks)] = value


def step_index(segments: Sequence[Segment]) -> StepIndex:
    """Returns where the tokens of these segments go and what they attend to."""
    count = np.array([s.count for s in segments])
    first = np.array([s.position for s in segments])
    table = np.zeros((len(segments), max(len(s.blocks) for s in segments)), np.int32)
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
    return StepIndex(places, table, tiles)


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


class TorchKVCache(KVCache):
    """Cache and attention in plain torch, for any device and dtype.

    Each segment gathers its own blocks at exact length, so no stale value can reach a result;
    the arithmetic is torch's scaled_dot_product_attention, whose bits may depend on the chunking.
    """

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        num_blocks: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(num_blocks)
        self.layers = [_TorchLayer(self, s, num_blocks, device, dtype) for s in shapes]

    def poison(self, blocks: Sequence[int], value: float) -> None:
        """See KVCache.poison."""
        for layer in self.layers:
            assert isinstance(layer, _TorchLayer)
            layer.cache[:, list(blocks)] = value


class _TorchLayer:
    def __init__(
        self,
        cache: TorchKVCache,
        shape: LayerShape,
        num_blocks: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._cache = cache
        self.cache = torch.zeros(
            (2, num_blocks, BLOCK, shape.num_kv_heads, shape.head_dim), device=device, dtype=dtype
        )

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int, softcap: float
    ) -> Tensor:
        out = torch.empty_like(query[0].transpose(0, 1))  # [tokens, heads, head_dim]
        fresh = torch.stack((key[0], value[0])).transpose(1, 2)  # [2, tokens, kv_heads, head_dim]
        for s in self._cache.segments:
            stop = s.position + s.count
            blocks = torch.tensor(list(s.blocks[: -(-stop // BLOCK)]), device=out.device)
            positions = torch.arange(s.position, stop, device=out.device)
            rows = slice(s.start, s.start + s.count)
            self.cache[:, blocks[positions // BLOCK], positions % BLOCK] = fresh[:, rows]
            past = self.cache.index_select(1, blocks).flatten(1, 2)[:, :stop]
            k, v = past.transpose(1, 2)  # [kv_heads, stop, head_dim]
            out[rows] = _attend(query[0, :, rows], k, v, positions, scale, window, softcap)
        return out[None]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scale: float, window: int, softcap: float
) -> Tensor:
    """Causal attention of rows at `positions` over keys 0..; returns [rows, heads, head_dim]."""
    keys = torch.arange(k.shape[1], device=k.device)
    visible = keys <= positions[:, None]
    if window:
        visible &= keys > positions[:, None] - window
    if not softcap:
        out = F.scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=visible, scale=scale, enable_gqa=True
        )[0]
        return out.transpose(0, 1)
    group = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    scores = softcap * torch.tanh(q @ k.transpose(1, 2) * scale / softcap)
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1, dtype=torch.float32)
    return (weights.to(v.dtype) @ v).transpose(0, 1)
