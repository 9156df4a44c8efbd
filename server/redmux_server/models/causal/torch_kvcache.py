"""The paged cache in plain torch, for any device and dtype."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from redmux_server.models.kvcache import BLOCK, KVCache, LayerShape


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
