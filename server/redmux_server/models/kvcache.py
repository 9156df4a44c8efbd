"""The key/value cache as runners see it: what each layer's attention is, and what a step holds."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from redmux.errors import InvalidArgumentError

BLOCK = 32  # tokens in a block, unless a device has blocks of its own


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


@dataclass(frozen=True, slots=True)
class LayerRule:
    """How a layer's attention weighs its keys."""

    scale: float
    window: int  # visible keys, 0 for all
    softcap: float  # 0 for none


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


def check_memory(
    kv_cache_tokens: int, num_tokens: int, bytes_per_token: int, device: torch.device
) -> None:
    """Raises InvalidArgumentError where a cache of `num_tokens` is more than the device's memory.

    `kv_cache_tokens` is the option that asked for it.
    """
    total = total_bytes(device)
    if num_tokens * bytes_per_token > total:
        raise InvalidArgumentError(
            f"kv_cache_tokens is {kv_cache_tokens}, which takes "
            f"{num_tokens * bytes_per_token / 2**30:,.1f} GiB, but "
            f"{device.type} has {total / 2**30:,.1f} GiB: {total // bytes_per_token} tokens at "
            "most; leave it out to fit the memory"
        )


def total_bytes(device: torch.device) -> int:
    """Returns the memory of a device, also what is in use."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
