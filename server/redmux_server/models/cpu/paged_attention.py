"""Exact-length paged attention for the CPU, compiled by numba.

Every query row walks the cache blocks of its own request, from its first visible key to its own
position, in a fixed order. What a row reads and the order in which it adds never depend on the
other rows of the step, nor on how a prompt was cut into chunks, so its result is bit-identical
alone and in any batch. Positions that are not written yet are never part of a result.

A block has its keys transposed, [head_dim, BLOCK], and its values plain, [BLOCK, padded head_dim],
both cut into panels of PANEL columns, as products read them: from end to end, and without a sum
across lanes.
"""

from dataclasses import dataclass

import numba
import numpy as np
from numba import prange

from redmux_server.models.cpu.aligned import scratch, zeros
from redmux_server.models.cpu.arithmetic import PANEL
from redmux_server.models.cpu.attend import attend_tile, attend_token, store
from redmux_server.models.cpu.compiled import compiled
from redmux_server.models.cpu.phases import claim, counters_of, finish, num_threads_of
from redmux_server.models.cpu.vector import START, Array
from redmux_server.models.kvcache import BLOCK

TILE = 4  # query tokens that share one pass over the keys
_MANY = 4  # requests for each thread
# As what keys and values of a dtype lie in memory: bf16 as the bits of its numbers.
KEPT_AS: dict[str, type] = {"float32": np.float32, "bfloat16": np.uint16}


@dataclass(frozen=True, slots=True)
class StepIndex:
    """Where the tokens of a step go and what they attend to; all arrays int32."""

    places: Array  # [2, tokens]: block and offset where a token's key and value are written
    table: Array  # [requests, blocks]: cache blocks of each request
    tiles: Array  # [4, tiles]: request, first token, tokens, position of the first token


def padded(head_dim: int) -> int:
    """Returns the number of lanes that a value takes in the cache."""
    return -(-head_dim // PANEL) * PANEL


@compiled
def _store_some(counters, thread, k, v, keys, values, places, layout, k_weight, eps, cos, sin):
    """Writes keys and values token by token until all are taken."""
    room = scratch(2 * layout[2]).reshape(2, layout[2])
    num_tokens, num_done = places.shape[1], 0
    token = claim(counters, thread, num_tokens)
    while token < num_tokens:
        store(
            k, v, keys, values, places, token, START, layout[1], layout, k_weight, eps, cos,
            sin, room,
        )  # fmt: skip
        num_done += 1
        token = claim(counters, thread, num_tokens)
    finish(counters, num_done, num_tokens)


@compiled
def attend_some(
    counters, thread, q, k, v, keys, values, out, cos, sin, q_weight, k_weight, eps, layout,
    places, table, tiles, scale, window, softcap,
):  # fmt: skip
    """Writes keys and values, then attends, a tile and KV head at a time; two phases.

    Arrays are flat, `layout` tells where a token's query, key and value lie in them; see
    PagedAttention.
    """
    # One token per request: whoever attends to a key has written it, so one phase is enough.
    stores = places.shape[1] == table.shape[0]
    if not stores:
        _store_some(
            counters[0], thread, k, v, keys, values, places, layout, k_weight, eps, cos, sin
        )
    room = scratch(2 * layout[2]).reshape(2, layout[2])
    # Requests enough for all threads leave a thread all heads of one.
    num_tiles = tiles.shape[1]
    heads = layout[1] if stores and num_tiles >= _MANY * num_threads_of(counters[1]) else 1
    splits = layout[1] // heads
    num_items, num_done = num_tiles * splits, 0
    item = claim(counters[1], thread, num_items)
    while item < num_items:
        n, head = item // splits, item % splits * heads
        row0, rows, position = np.int64(tiles[1, n]), tiles[2, n], tiles[3, n]
        blocks = table[tiles[0, n]]
        if stores:
            store(
                k, v, keys, values, places, row0, head, heads, layout, k_weight, eps, cos, sin,
                room,
            )  # fmt: skip
        if rows == 1:
            attend_token(
                q, keys, values, out, cos, sin, q_weight, eps, blocks, row0, position, head, heads,
                layout, scale, window, softcap,
            )  # fmt: skip
        else:
            attend_tile(
                q, keys, values, out, cos, sin, q_weight, eps, blocks, row0, rows, position, head,
                layout, scale, window, softcap,
            )  # fmt: skip
        num_done += 1
        item = claim(counters[1], thread, num_items)
    finish(counters[1], num_done, num_items)


@compiled(parallel=True)
def _attend(
    num_threads, q, k, v, keys, values, out, layout, places, table, tiles, scale, window, softcap
):
    counters = counters_of(2, num_threads)
    nothing = np.zeros(0, np.float32)
    for index in prange(num_threads):
        thread = np.int64(index)
        attend_some(
            counters, thread, q, k, v, keys, values, out, nothing, nothing, nothing, nothing,
            np.float32(0), layout, places, table, tiles, scale, window, softcap,
        )  # fmt: skip


def new_blocks(
    num_layers: int, num_blocks: int, num_kv_heads: int, head_dim: int, dtype: str
) -> tuple[Array, Array]:
    """Returns room for keys and values: [layers, blocks, kv_heads, panels, rows, PANEL].

    `dtype` is one of KEPT_AS.

    Memory is committed as blocks are first used, which torch.zeros would not do.
    """
    shape = (num_layers, num_blocks, num_kv_heads)
    return (
        zeros((*shape, BLOCK // PANEL, head_dim, PANEL), KEPT_AS[dtype]),
        zeros((*shape, padded(head_dim) // PANEL, BLOCK, PANEL), KEPT_AS[dtype]),
    )


class PagedAttention:
    """Keys and values of one layer in blocks, and attention over them."""

    def __init__(
        self, num_heads: int, num_kv_heads: int, head_dim: int, keys: Array, values: Array
    ) -> None:
        """`keys` and `values` are what `new_blocks` gives for one layer."""
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.keys, self.values = keys, values
        width = padded(head_dim)
        query, key = num_heads * head_dim, num_kv_heads * head_dim
        shape = (num_heads, num_kv_heads, head_dim, width)
        # Then first element and elements per token of q, k and v.
        self._apart = np.array((*shape, 0, query, 0, key, 0, key), np.int64)
        row = query + 2 * key
        # The same for q, k and v side by side in one row per token.
        self.packed_layout = np.array((*shape, 0, row, query, row, query + key, row), np.int64)

    def attend(
        self, q: Array, k: Array, v: Array, out: Array, step: StepIndex,
        scale: float, window: int, softcap: float,
    ) -> None:  # fmt: skip
        """Writes k and v of a step's tokens into the cache and fills `out` with their attention.

        q, out: [tokens, heads, head_dim]; k, v: [tokens, kv_heads, head_dim]; fp32 and contiguous.
        `window` counts visible keys, 0 for all; `softcap` is 0 for none.
        """
        _attend(
            numba.get_num_threads(), q.reshape(-1), k.reshape(-1), v.reshape(-1),
            self.keys.reshape(-1), self.values.reshape(-1), out.reshape(-1), self._apart,
            step.places, step.table, step.tiles,
            np.float32(scale), np.int64(window), np.float32(softcap),
        )  # fmt: skip
