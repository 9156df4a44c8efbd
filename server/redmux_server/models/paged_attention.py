"""Exact-length paged attention for the CPU, compiled by numba.

Every query row walks the cache blocks of its own request, from its first visible key to its own
position, in a fixed order. What a row reads and the order in which it adds never depend on the
other rows of the step, nor on how a prompt was cut into chunks, so its result is bit-identical
alone and in any batch. Positions that are not written yet are never part of a result.

Keys are stored transposed inside a block, [head_dim, BLOCK], and values plain, [BLOCK, head_dim]:
both products then run over contiguous lanes without a horizontal reduction.
"""

import math
from typing import Any

import numpy as np
from numba import njit, prange

BLOCK = 32  # tokens in a cache block: four AVX2 vectors of keys
TILE = 4  # query tokens that share one pass over the keys

# Contraction to fused multiply-add is the same in every lane; nothing may be reordered.
_FASTMATH = {"contract", "nsz"}
_LOG2_E = np.float32(1.44269504088896341)
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)


@njit(fastmath=_FASTMATH, inline="always")
def _exp(x):
    """exp(x) for x <= 0, relative error 2e-7 (Cephes expf), in a form that vectorises."""
    x = max(x, np.float32(-87.0))
    n = math.floor(x * _LOG2_E + np.float32(0.5))
    r = x - n * _LN2_HIGH - n * _LN2_LOW
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    y = p * r * r + r + np.float32(1.0)
    return y * np.int32((np.int32(n) + 127) << 23).view(np.float32)


@njit(fastmath=_FASTMATH, nogil=True, cache=True)
def _scores(q, keys, block_ids, first_block, num_blocks, row0, rows, head, group, scores, lanes):
    """scores[i * group + g, :] = q[row0 + i, head * group + g] . keys, over whole blocks."""
    head_dim = len(lanes) * 4
    for p in range(num_blocks):
        block = block_ids[first_block + p]
        base = p * BLOCK
        for i in range(rows):
            for g in range(group):
                r = i * group + g
                for t in range(BLOCK):
                    scores[r, base + t] = np.float32(0.0)
                for d in range(0, head_dim, 4):
                    q0 = q[row0 + i, head * group + g, d]
                    q1 = q[row0 + i, head * group + g, d + 1]
                    q2 = q[row0 + i, head * group + g, d + 2]
                    q3 = q[row0 + i, head * group + g, d + 3]
                    for t in range(BLOCK):
                        s = scores[r, base + t]
                        s = s + q0 * keys[block, head, d, t]
                        s = s + q1 * keys[block, head, d + 1, t]
                        s = s + q2 * keys[block, head, d + 2, t]
                        s = s + q3 * keys[block, head, d + 3, t]
                        scores[r, base + t] = s


@njit(fastmath=_FASTMATH, nogil=True, cache=True)
def _softmax(scores, r, start, stop, scale, softcap):
    """Turns scores[r, start:stop] into unnormalised weights; returns 1 / their sum."""
    if softcap > 0:
        for t in range(start, stop):
            scores[r, t] = softcap * math.tanh(scores[r, t] * scale / softcap)
        scale = np.float32(1.0)
    highest = np.float32(-np.inf)
    for t in range(start, stop):
        highest = max(highest, scores[r, t])
    highest = highest * scale
    for t in range(start, stop):
        scores[r, t] = _exp(scores[r, t] * scale - highest)
    sum0 = np.float32(0.0)
    sum1 = np.float32(0.0)
    sum2 = np.float32(0.0)
    sum3 = np.float32(0.0)
    whole = stop - (stop - start) % 4
    for t in range(start, whole, 4):
        sum0 += scores[r, t]
        sum1 += scores[r, t + 1]
        sum2 += scores[r, t + 2]
        sum3 += scores[r, t + 3]
    for t in range(whole, stop):
        sum0 += scores[r, t]
    return np.float32(1.0) / ((sum0 + sum1) + (sum2 + sum3))


@njit(fastmath=_FASTMATH, nogil=True, cache=True)
def _add_values(scores, r, base, start, stop, values, block, head, out, row, out_head, lanes):
    """out[row, out_head] += scores[r, base + t] * values[block, head, t] for t in start..stop."""
    head_dim = len(lanes) * 4
    whole = stop - (stop - start) % 4
    for t in range(start, whole, 4):
        w0 = scores[r, base + t]
        w1 = scores[r, base + t + 1]
        w2 = scores[r, base + t + 2]
        w3 = scores[r, base + t + 3]
        for d in range(head_dim):
            x = out[row, out_head, d]
            x = x + w0 * values[block, head, t, d]
            x = x + w1 * values[block, head, t + 1, d]
            x = x + w2 * values[block, head, t + 2, d]
            x = x + w3 * values[block, head, t + 3, d]
            out[row, out_head, d] = x
    for t in range(whole, stop):
        w = scores[r, base + t]
        for d in range(head_dim):
            out[row, out_head, d] += w * values[block, head, t, d]


@njit(fastmath=_FASTMATH, nogil=True, cache=True)
def _attend_tile(
    q, keys, values, block_ids, row0, rows, position0, head, scale, window, softcap, out, lanes
):
    """Fills out[row0 : row0 + rows] for one KV head; row i sits at position0 + i of its request."""
    group = q.shape[1] // keys.shape[1]
    head_dim = len(lanes) * 4
    first_key = max(0, position0 - window + 1) if window > 0 else 0
    first_block = first_key // BLOCK
    num_blocks = (position0 + rows - 1) // BLOCK - first_block + 1
    origin = first_block * BLOCK  # position of scores[:, 0]
    scores = np.empty((rows * group, num_blocks * BLOCK), np.float32)
    inverse = np.empty(rows * group, np.float32)
    _scores(q, keys, block_ids, first_block, num_blocks, row0, rows, head, group, scores, lanes)
    for i in range(rows):
        stop = position0 + i + 1
        start = max(0, stop - window) if window > 0 else 0
        for g in range(group):
            r = i * group + g
            inverse[r] = _softmax(scores, r, start - origin, stop - origin, scale, softcap)
            for d in range(head_dim):
                out[row0 + i, head * group + g, d] = np.float32(0.0)
    for p in range(num_blocks):
        block = block_ids[first_block + p]
        base = p * BLOCK
        for i in range(rows):
            stop = position0 + i + 1
            start = max(0, stop - window) if window > 0 else 0
            low = max(0, start - origin - base)
            high = min(BLOCK, stop - origin - base)
            if high > low:
                for g in range(group):
                    r = i * group + g
                    _add_values(
                        scores, r, base, low, high, values, block, head,
                        out, row0 + i, head * group + g, lanes,
                    )  # fmt: skip
    for i in range(rows):
        for g in range(group):
            for d in range(head_dim):
                out[row0 + i, head * group + g, d] *= inverse[i * group + g]


@njit(fastmath=_FASTMATH, nogil=True, parallel=True, cache=True)
def _attend(
    q, k, v, keys, values, write_block, write_offset,
    block_table, tile_request, tile_row, tile_rows, tile_position,
    scale, window, softcap, out, lanes,
):  # fmt: skip
    num_tokens = k.shape[0]
    num_kv_heads = k.shape[1]
    head_dim = len(lanes) * 4
    for j in prange(num_tokens * num_kv_heads):
        t = j // num_kv_heads
        h = j % num_kv_heads
        for d in range(head_dim):
            keys[write_block[t], h, d, write_offset[t]] = k[t, h, d]
            values[write_block[t], h, write_offset[t], d] = v[t, h, d]
    for j in prange(tile_row.shape[0] * num_kv_heads):
        n = j // num_kv_heads
        _attend_tile(
            q, keys, values, block_table[tile_request[n]], tile_row[n], tile_rows[n],
            tile_position[n], j % num_kv_heads, scale, window, softcap, out, lanes,
        )  # fmt: skip


def attend(
    q: np.ndarray[Any, Any],
    k: np.ndarray[Any, Any],
    v: np.ndarray[Any, Any],
    keys: np.ndarray[Any, Any],
    values: np.ndarray[Any, Any],
    step: tuple[np.ndarray[Any, Any], ...],
    scale: float,
    window: int,
    softcap: float,
    out: np.ndarray[Any, Any],
) -> None:
    """Writes k and v of a step's tokens into the cache and fills `out` with their attention.

    q, out: [tokens, heads, head_dim]; k, v: [tokens, kv_heads, head_dim], all fp32.
    keys: [blocks, kv_heads, head_dim, BLOCK]; values: [blocks, kv_heads, BLOCK, head_dim].
    step: write_block, write_offset [tokens]; block_table [requests, blocks]; tile_request,
    tile_row, tile_rows, tile_position [tiles], all int32. `window` counts visible keys, 0 for all;
    `softcap` 0 for none. head_dim must be a multiple of 4.
    """
    # The length of a tuple is part of its compiled type: loops over head_dim get constant bounds.
    lanes = (0,) * (q.shape[2] // 4)
    _attend(
        q, k, v, keys, values, *step,
        np.float32(scale), np.int32(window), np.float32(softcap), out, lanes,
    )  # fmt: skip
