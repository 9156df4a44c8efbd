"""Attention by the formula, in fp64 and plain loops, and random ragged steps to hold it against."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from redmux_server.models.causal.torch_kvcache import TorchKVCache
from redmux_server.models.cpu.kvcache import NumbaKVCache
from redmux_server.models.cuda.paged_cache import PagedKVCache
from redmux_server.models.cuda.paged_torch import TorchAttention
from redmux_server.models.kvcache import BLOCK, LayerShape, Segment


@dataclass(frozen=True)
class Sequence:
    """Queries, keys and values [tokens, heads, head_dim] of one request, and its blocks."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    blocks: list[int]

    def __len__(self):
        return len(self.q)


@dataclass(frozen=True)
class Rule:
    """What an attention module passes on beside its tensors."""

    scale: float
    window: int = 0
    softcap: float = 0.0


def make_cache(kind, shape: LayerShape, num_blocks: int, poison: float | None = None):
    if kind == "numba":
        cache = NumbaKVCache([shape], num_blocks)
    elif kind == "rounded":
        cache = NumbaKVCache([shape], num_blocks, torch.bfloat16)
    elif kind == "paged":
        cache = make_paged_cache([shape], num_blocks)
    else:
        cache = TorchKVCache([shape], num_blocks, torch.device("cpu"), torch.float32)
    if poison is not None:
        cache.poison(range(num_blocks), poison)
    return cache


def as_kept(kind, sequence: Sequence) -> Sequence:
    """The sequence as a cache of this kind keeps it."""
    if kind != "rounded":
        return sequence
    k, v = (torch.from_numpy(x).bfloat16().float().numpy() for x in (sequence.k, sequence.v))
    return Sequence(sequence.q, k, v, sequence.blocks)


def make_paged_cache(shapes, num_blocks) -> PagedKVCache:
    attention = TorchAttention()
    assert attention.block_size == BLOCK
    return PagedKVCache(shapes, num_blocks, attention, torch.device("cpu"), torch.float32)


def make_sequences(seed, shape: LayerShape, lengths, spare=1) -> tuple[list[Sequence], int]:
    """Random requests with shuffled blocks, more than they need; returns them and num_blocks."""
    rng = np.random.default_rng(seed)
    counts = [-(-n // BLOCK) + spare for n in lengths]
    ids = rng.permutation(sum(counts) + 2).tolist()
    out = []
    for n, count in zip(lengths, counts, strict=True):
        blocks, ids = ids[:count], ids[count:]
        q, k, v = (
            rng.standard_normal((n, heads, shape.head_dim)).astype(np.float32)
            for heads in (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
        )
        out.append(Sequence(2 * q, k, v, blocks))
    return out, sum(counts) + 2


def run_step(cache, parts, rule: Rule) -> list[np.ndarray]:
    """Runs (sequence, start, stop) parts as one step; returns [count, heads, head_dim] of each."""
    segments, row = [], 0
    for sequence, start, stop in parts:
        segments.append(Segment(row, stop - start, start, sequence.blocks))
        row += stop - start
    q, k, v = (
        torch.from_numpy(np.concatenate([getattr(s, name)[a:b] for s, a, b in parts]))
        .transpose(0, 1)
        .unsqueeze(0)
        for name in "qkv"
    )
    with cache.step(segments):
        out = cache.layers[0](q, k, v, rule.scale, rule.window, rule.softcap)
    assert out.shape == (1, row, q.shape[1], q.shape[3])
    rows = out[0].numpy()
    return [rows[s.start : s.start + s.count] for s in segments]


def run_chunks(cache, sequence, cuts, rule: Rule) -> np.ndarray:
    """Runs one sequence alone, cut at these positions."""
    ends = [*sorted(set(cuts) - {0, len(sequence)}), len(sequence)]
    out, start = [], 0
    for stop in ends:
        out += run_step(cache, [(sequence, start, stop)], rule)
        start = stop
    return np.concatenate(out)


def naive(sequence: Sequence, rule: Rule) -> np.ndarray:
    """[tokens, heads, head_dim] in fp64; nothing is shared with the code under test."""
    q, k, v = (x.astype(np.float64) for x in (sequence.q, sequence.k, sequence.v))
    group = q.shape[1] // k.shape[1]
    out = np.zeros_like(q)
    for t in range(q.shape[0]):
        first = max(0, t + 1 - rule.window) if rule.window else 0
        for head in range(q.shape[1]):
            scores = []
            for past in range(first, t + 1):
                score = float(q[t, head] @ k[past, head // group]) * rule.scale
                if rule.softcap:
                    score = rule.softcap * math.tanh(score / rule.softcap)
                scores.append(score)
            weights = [math.exp(score - max(scores)) for score in scores]
            for weight, past in zip(weights, range(first, t + 1), strict=True):
                out[t, head] += weight / sum(weights) * v[past, head // group]
    return out
