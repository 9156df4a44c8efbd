"""Attention over whole sequences for the CPU, compiled by numba: no key is hidden from a row.

Keys and values lie in panels, as in a block of `paged_attention`. Each result is one fixed chain of
operations over the keys of its own sequence, in their order, so it has the same bits alone and in
any batch, which a product of torch's need not have.
"""

import numba
import numpy as np
from numba import prange

from redmux_server.models.cpu.aligned import scratch, zeros
from redmux_server.models.cpu.arithmetic import PANEL
from redmux_server.models.cpu.attend import softmax
from redmux_server.models.cpu.compiled import compiled
from redmux_server.models.cpu.folds import LANES
from redmux_server.models.cpu.paged_attention import padded
from redmux_server.models.cpu.phases import claim, counters_of, finish
from redmux_server.models.cpu.vector import ANEW, START, Array, product

_ROWS = 32  # queries that share one pass over the keys
NO_BIAS = np.zeros((0, 0), np.float32)


@compiled(forceinline=True)
def _round_up(value, multiple):
    return (value + multiple - 1) // multiple * multiple


@compiled
def _store(k, v, position, keys, values):
    """Writes one head's key and value [dim] to its panels; see `Panels`."""
    dim = k.size
    for d in range(dim):
        keys[position // PANEL, d, position % PANEL] = k[d]
    for first in range(0, dim, PANEL):
        for d in range(min(PANEL, dim - first)):
            values[first // PANEL, position, d] = v[first + d]


@compiled
def _attend_rows(q, row0, rows, head, keys, values, num_keys, bias, position0, scale, out):
    """Fills out[row0 : row0 + rows, head] from the first `num_keys` keys of one head's panels.

    Row i stands at position0 + i; to its score of key j, bias[head, j - position of the row + the
    middle] is added, unless bias is empty.
    """
    dim, width = q.shape[2], values.shape[0] * PANEL
    room = _round_up(num_keys, LANES)
    heads, scores, sums = scratch(rows * dim), scratch(rows * room), scratch(rows * width)
    for r in range(rows):
        for d in range(dim):
            heads[r * dim + d] = q[row0 + r, head, d]
    product(
        rows, room, heads, START, dim, keys.reshape(-1), START, dim * PANEL, dim,
        scores, START, room, ANEW, START,
    )  # fmt: skip
    for r in range(rows):
        line = scores[r * room : (r + 1) * room]
        if bias.size > 0:
            first = bias.shape[1] // 2 - (position0 + r)
            for j in range(num_keys):
                line[j] = line[j] * scale + bias[head, first + j]
        inverse = softmax(
            line, START, num_keys, np.float32(1) if bias.size > 0 else scale, np.float32(0)
        )
        for j in range(num_keys):
            line[j] *= inverse
    product(
        rows, width, scores, START, room, values.reshape(-1), START, values.shape[1] * PANEL,
        num_keys, sums, START, width, ANEW, START,
    )  # fmt: skip
    for r in range(rows):
        for d in range(dim):
            out[row0 + r, head, d] = sums[r * width + d]


@compiled
def _attend_sequence(q, k, v, start, stop, head, bias, scale, out):
    count, dim = stop - start, q.shape[2]
    width, room = _round_up(dim, PANEL), _round_up(count, LANES)
    all_keys, all_values = scratch(room * dim), scratch(count * width)
    all_keys[:], all_values[:] = 0, 0
    keys = all_keys.reshape(room // PANEL, dim, PANEL)
    values = all_values.reshape(width // PANEL, count, PANEL)
    for i in range(count):
        _store(k[start + i, head], v[start + i, head], i, keys, values)
    for first in range(0, count, _ROWS):
        rows = min(_ROWS, count - first)
        _attend_rows(q, start + first, rows, head, keys, values, count, bias, first, scale, out)


@compiled(parallel=True)
def _attend_sequences(num_threads, q, k, v, starts, bias, scale, out):
    counters = counters_of(1, num_threads)
    num_heads = q.shape[1]
    num_items = (starts.size - 1) * num_heads
    for index in prange(num_threads):
        thread = np.int64(index)
        num_done = 0
        item = claim(counters[0], thread, num_items)
        while item < num_items:
            i = item // num_heads
            _attend_sequence(q, k, v, starts[i], starts[i + 1], item % num_heads, bias, scale, out)
            num_done += 1
            item = claim(counters[0], thread, num_items)
        finish(counters[0], num_done, num_items)


@compiled
def _attend_one(q, keys, values, num_keys, bias, position, scale, out):
    one = np.int64(1)
    for head in range(q.shape[1]):
        _attend_rows(
            q, START, one, head, keys[head], values[head], num_keys, bias, position, scale, out
        )


@compiled
def _append(k, v, position, keys, values):
    for i in range(k.shape[0]):
        for head in range(k.shape[1]):
            _store(k[i, head], v[i, head], position + i, keys[head], values[head])


def attend(q: Array, k: Array, v: Array, starts: Array, bias: Array, scale: float) -> Array:
    """Returns the attention [tokens, heads, dim] inside each of the sequences.

    q, k and v are [tokens, heads, dim], fp32; sequence i is the tokens from starts[i] to
    starts[i + 1], int64. `bias` [heads, 2 * n - 1] is added to the scores by the distance of key
    and query, from 1 - n to n - 1; NO_BIAS for none.
    """
    out = np.empty(q.shape, np.float32)
    _attend_sequences(numba.get_num_threads(), q, k, v, starts, bias, np.float32(scale), out)
    return out


class Panels:
    """The keys and values of one sequence in one layer, one head after the other.

    Keys are [heads, panels, dim, PANEL] and values [heads, panels, positions, PANEL].
    """

    def __init__(self, num_heads: int, dim: int, capacity: int) -> None:
        num_keys = -(-capacity // LANES) * LANES
        self._keys = zeros((num_heads, num_keys // PANEL, dim, PANEL), np.float32)
        self._values = zeros((num_heads, padded(dim) // PANEL, capacity, PANEL), np.float32)

    def store(self, position: int, k: Array, v: Array) -> None:
        """Writes keys and values [tokens, heads, dim] from this position on."""
        _append(k, v, position, self._keys, self._values)

    def attend(self, q: Array, num_keys: int, bias: Array, position: int, scale: float) -> Array:
        """Returns the attention [1, heads, dim] of one query over the first `num_keys` keys.

        It stands at `position`; `bias` is as that of `attend`.
        """
        out = np.empty(q.shape, np.float32)
        _attend_one(q, self._keys, self._values, num_keys, bias, position, np.float32(scale), out)
        return out
