"""Attention of one token, or a tile of tokens, over the cache blocks of its request."""

import math

import numpy as np

from redmux_server.models.cpu.aligned import scratch
from redmux_server.models.cpu.arithmetic import PANEL
from redmux_server.models.cpu.compiled import compiled
from redmux_server.models.cpu.folds import LANES, largest, sum_squares, total
from redmux_server.models.cpu.narrow import kept
from redmux_server.models.cpu.vector import ADD, ANEW, START, exp, product
from redmux_server.models.kvcache import BLOCK

assert BLOCK % PANEL == BLOCK % LANES == 0, "blocks are read in whole panels and folds"


_COLUMNS = np.int64(BLOCK)  # see START


# Inlined, as handing over arrays takes longer than the work. Indices are unsigned: signed ones may
# count from the end, and loops that have to find out are not vectorised.
@compiled(forceinline=True)
def _rotate(x, at, dim, cos, sin, turn, out, to):
    """Copies `dim` elements of x from `at` on to `to` in out, rotated unless cos is empty."""
    at, turn, to, dim = np.uint64(at), np.uint64(turn), np.uint64(to), np.uint64(dim)
    if cos.size > 0:
        half = dim // np.uint64(2)
        for d in range(half):
            out[to + d] = x[at + d] * cos[turn + d] - x[at + half + d] * sin[turn + d]
        for d in range(half, dim):
            out[to + d] = x[at + d] * cos[turn + d] + x[at + d - half] * sin[turn + d]
    else:
        for d in range(dim):
            out[to + d] = x[at + d]


@compiled(forceinline=True)
def _load_head(x, at, token, weight, eps, cos, sin, room, out, to):
    """As `_rotate` for one head of a token, normalised before if weight is not empty.

    `room` is [head_dim].
    """
    dim = room.size
    if weight.size > 0:
        head = x[at : at + dim]
        inverse = np.float32(1.0) / math.sqrt(sum_squares(head) / np.float32(dim) + eps)
        for d in range(dim):
            room[d] = head[d] * inverse * weight[d]
        _rotate(room, START, dim, cos, sin, token * dim, out, to)
    else:
        _rotate(x, at, dim, cos, sin, token * dim, out, to)


@compiled
def store(
    k, v, keys, values, places, token, head0, num_heads, layout, k_weight, eps, cos, sin, room
):
    """Writes keys and values of one token, some KV heads, into the cache; room: [2, head_dim]."""
    num_kv_heads, dim, width = layout[1], layout[2], layout[3]
    offset = places[1, token]
    for head in range(head0, head0 + num_heads):
        slot = places[0, token] * num_kv_heads + head
        at = layout[6] + token * layout[7] + head * dim
        _load_head(k, at, token, k_weight, eps, cos, sin, room[0], room[1], START)
        column = keys[slot * dim * BLOCK + offset // PANEL * dim * PANEL + offset % PANEL :]
        for d in range(dim):
            column[d * PANEL] = kept(room[1, d], keys)
        at = layout[8] + token * layout[9] + head * dim
        row = values[slot * BLOCK * width + offset * PANEL :]
        for first in range(0, dim, PANEL):
            source, target = v[at + first : at + dim], row[first * BLOCK :]
            for d in range(min(PANEL, dim - first)):
                target[d] = kept(source[d], values)


@compiled
def softmax(scores, start, stop, scale, softcap):
    """Turns scores[start:stop] into weights and the rest into 0; returns 1 / the weights' sum.

    Folds run lane by lane over whole blocks, so their order depends on the position of a key alone.
    """
    scores[:start] = -np.inf
    scores[stop:] = -np.inf
    if softcap > 0:
        for t in range(start, stop):
            scores[t] = softcap * math.tanh(scores[t] * scale / softcap)
        scale = np.float32(1.0)
    highest = largest(scores) * scale
    for t in range(scores.size):
        scores[t] = exp(scores[t] * scale - highest)
    scores[:start] = np.float32(0.0)
    scores[stop:] = np.float32(0.0)
    return np.float32(1.0) / total(scores)


@compiled(forceinline=True)
def _scale(x, factor, out):
    for d in range(x.size):
        out[d] = x[d] * factor


@compiled
def _add_values(
    weights, num_keys, origin, line, lines, start, stop, values, blocks, head, layout, sums
):
    """sums[line : line + lines] += weights of the keys at positions start..stop @ their values."""
    num_kv_heads, width = layout[1], layout[3]
    t = start
    while t < stop:
        offset = t % BLOCK
        count = min(BLOCK - offset, stop - t)
        slot = blocks[t // BLOCK] * num_kv_heads + head
        # The next block comes from anywhere in memory: it is on its way while this one is used.
        ahead = 0
        if t + count < stop:
            ahead = (blocks[(t + count) // BLOCK] * num_kv_heads + head - slot) * BLOCK * width
        product(
            lines, width, weights, line * num_keys + t - origin, num_keys,
            values, slot * BLOCK * width + offset * PANEL, BLOCK * PANEL, count,
            sums, line * width, width, ADD,
            ahead,
        )  # fmt: skip
        t += count


@compiled
def attend_tile(
    q, keys, values, out, cos, sin, q_weight, eps, blocks, row0, rows, position0, head, layout,
    scale, window, softcap,
):  # fmt: skip
    """Fills out[row0 : row0 + rows] for one KV head; row i sits at position0 + i of its request."""
    num_kv_heads, dim, width = layout[1], layout[2], layout[3]
    group = layout[0] // num_kv_heads
    first_key = max(0, position0 - window + 1) if window > 0 else 0
    first_block = first_key // BLOCK
    origin = first_block * BLOCK  # position of scores[:, 0]
    last = position0 + rows - 1
    num_blocks = last // BLOCK - first_block + 1
    num_keys = num_blocks * BLOCK
    lines = rows * group
    heads, head_room = scratch(lines * dim), scratch(dim)
    scores, sums = scratch(lines * num_keys), scratch(lines * width)
    inverse = scratch(lines)
    for i in range(rows):
        for g in range(group):
            at = layout[4] + (row0 + i) * layout[5] + (head * group + g) * dim
            to = (i * group + g) * dim
            _load_head(q, at, row0 + i, q_weight, eps, cos, sin, head_room, heads, to)
    for p in range(num_blocks):
        slot = blocks[first_block + p] * num_kv_heads + head
        ahead = 0
        if p + 1 < num_blocks:
            ahead = (blocks[first_block + p + 1] * num_kv_heads + head - slot) * dim * BLOCK
        product(
            lines, _COLUMNS, heads, START, dim, keys, slot * dim * BLOCK, dim * PANEL, dim,
            scores, p * BLOCK, num_keys, ANEW, ahead,
        )  # fmt: skip
    for i in range(rows):
        stop = position0 + i + 1
        start = max(0, stop - window) if window > 0 else 0
        for g in range(group):
            r = i * group + g
            row = scores[r * num_keys : (r + 1) * num_keys]
            inverse[r] = softmax(row, start - origin, stop - origin, scale, softcap)
    for i in range(lines * width):
        sums[i] = np.float32(0.0)
    # Keys that every row sees are walked once; the few others row by row, in the same order.
    shared = max(0, last + 1 - window) if window > 0 else 0
    shared_stop = max(shared, position0 + 1)
    for i in range(rows):
        stop = position0 + i + 1
        start = max(0, stop - window) if window > 0 else 0
        _add_values(
            scores, num_keys, origin, i * group, group, start, min(shared, stop),
            values, blocks, head, layout, sums,
        )  # fmt: skip
    _add_values(
        scores, num_keys, origin, START, lines, shared, position0 + 1, values, blocks, head,
        layout, sums,
    )  # fmt: skip
    for i in range(rows):
        _add_values(
            scores, num_keys, origin, i * group, group, shared_stop, position0 + i + 1,
            values, blocks, head, layout, sums,
        )  # fmt: skip
    for i in range(rows):
        for g in range(group):
            r = i * group + g
            at = ((row0 + i) * layout[0] + head * group + g) * dim
            _scale(sums[r * width : r * width + dim], inverse[r], out[at : at + dim])


@compiled
def attend_token(
    q, keys, values, out, cos, sin, q_weight, eps, blocks, row, position, head0, num_heads, layout,
    scale, window, softcap,
):  # fmt: skip
    """Does what `attend_tile` does, with the same bits, for one row and some KV heads at once.

    The heads of a block lie side by side, so that memory is read in longer streams.
    """
    num_kv_heads, dim, width = layout[1], layout[2], layout[3]
    group = layout[0] // num_kv_heads
    start = max(0, position - window + 1) if window > 0 else 0
    first_block, stop = start // BLOCK, position + 1
    num_blocks = position // BLOCK - first_block + 1
    num_keys, origin = num_blocks * BLOCK, first_block * BLOCK
    lines = num_heads * group
    heads, head_room = scratch(lines * dim), scratch(dim)
    scores, sums = scratch(lines * num_keys), scratch(lines * width)
    inverse = scratch(lines)
    for i in range(lines):
        at = layout[4] + row * layout[5] + (head0 * group + i) * dim
        _load_head(q, at, row, q_weight, eps, cos, sin, head_room, heads, i * dim)
    for p in range(num_blocks):
        slot = blocks[first_block + p] * num_kv_heads + head0
        following = slot
        if p + 1 < num_blocks:
            following = blocks[first_block + p + 1] * num_kv_heads + head0
        for h in range(num_heads):
            # What is fetched meanwhile: as many bytes, of the next block.
            product(
                group, _COLUMNS, heads, h * group * dim, dim,
                keys, (slot + h) * dim * BLOCK, dim * PANEL, dim,
                scores, h * group * num_keys + p * BLOCK, num_keys, ANEW,
                (following - slot) * dim * BLOCK,
            )  # fmt: skip
    for i in range(lines):
        line = scores[i * num_keys : (i + 1) * num_keys]
        inverse[i] = softmax(line, start - origin, stop - origin, scale, softcap)
    for i in range(lines * width):
        sums[i] = np.float32(0.0)
    for p in range(num_blocks):
        slot = blocks[first_block + p] * num_kv_heads + head0
        following = slot
        if p + 1 < num_blocks:
            following = blocks[first_block + p + 1] * num_kv_heads + head0
        begin = max(start - origin - p * BLOCK, 0)
        count = min(BLOCK, stop - origin - p * BLOCK) - begin
        for h in range(num_heads):
            product(
                group, width, scores, h * group * num_keys + p * BLOCK + begin, num_keys,
                values, (slot + h) * BLOCK * width + begin * PANEL, BLOCK * PANEL, count,
                sums, h * group * width, width, ADD, (following - slot) * BLOCK * width,
            )  # fmt: skip
    for i in range(lines):
        at = (row * layout[0] + head0 * group + i) * dim
        _scale(sums[i * width : i * width + dim], inverse[i], out[at : at + dim])
