"""How long requests may be, how many tokens the cache holds, and what it keeps of them."""

import os
from collections.abc import Sequence

import torch

from redmux.errors import InvalidArgumentError
from redmux_server.config import ServerConfig
from redmux_server.models.causal.context_limit import ContextLimit
from redmux_server.models.causal.selfcheck import min_cache_tokens
from redmux_server.models.kvcache import BLOCK, KVCache, LayerShape, check_memory

_DEFAULT_CACHE_BYTES = 2 << 30
_DEFAULT_IDLE_BYTES = 128 << 20


def context_and_cache(
    config: ServerConfig, device: torch.device, per_token: int, limit: ContextLimit,
    block_size: int = BLOCK,
) -> tuple[int, int]:  # fmt: skip
    """Returns (most tokens of a request, tokens in the cache, a multiple of `block_size`).

    `per_token` is what the keys and values of a token take, in bytes.
    """
    context = config.max_context or limit.num_tokens
    if context > limit.num_tokens:
        raise InvalidArgumentError(
            f"max_context is {context}, but can be {limit.num_tokens} at most: {limit.reason}"
        )
    tokens = config.kv_cache_tokens
    if not tokens:
        num_bytes = _free_bytes(device) // 4
        if device.type == "cpu":
            num_bytes = min(_DEFAULT_CACHE_BYTES, num_bytes)
        whole_requests = config.max_running * -(-context // block_size) * block_size
        tokens = max(min(num_bytes // per_token, whole_requests), min_cache_tokens(block_size))
    tokens = -(-tokens // block_size) * block_size
    check_memory(config.kv_cache_tokens, tokens, per_token, device)
    return min(context, tokens), tokens


def context_reason(max_context: int, limit: ContextLimit) -> str:
    """Returns how long requests may be and why, for people."""
    why = limit.reason if max_context == limit.num_tokens else "set, or all that the cache holds"
    return f"context: {max_context} tokens, {why}"


def kv_bytes_per_token(shapes: Sequence[LayerShape], dtype: torch.dtype) -> int:
    """Returns what a token's keys and values take in all layers."""
    return sum(2 * s.num_kv_heads * s.head_dim for s in shapes) * dtype.itemsize


def max_idle(config: ServerConfig, device: torch.device, block_bytes: int) -> int | None:
    """Returns how many blocks may wait for later prompts, or None for all of them."""
    if config.prefix_cache_bytes or device.type == "cpu":
        return (config.prefix_cache_bytes or _DEFAULT_IDLE_BYTES) // block_bytes
    return None


def prefix_reason(config: ServerConfig, cache: KVCache, max_idle: int | None) -> str:
    """Returns how much the prefix cache keeps, for people."""
    if not config.prefix_cache:
        return "prefix cache: off (set by configuration)"
    num_idle = cache.num_blocks if max_idle is None else min(cache.num_blocks, max_idle)
    return (
        f"prefix cache: on, keeps {num_idle * cache.block_size} tokens in blocks of "
        f"{cache.block_size}, never shared by tenants or adapters"
    )


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] * 3  # the GPU is ours: take three quarters
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
