"""Paged attention as Triton kernels: every dtype, head size, window and soft cap."""

import triton
import triton.language as tl
from torch import Tensor, float32

from redmux_server.models.cuda.paged_cache import AttentionRule
from redmux_server.models.cuda.paged_step import PagedStep
from redmux_server.models.cuda.triton_early import follow, launch_options, lead

_KEYS = 64  # of one turn of the loop
_ROWS = 64  # query rows of one program, where requests bring several tokens
_FEWEST_ROWS = 16  # that a matrix unit takes
_MOST_PARTS = 32
_PROGRAMS_PER_SM = 4  # of decodes: enough loads in flight to use the memory's whole bandwidth
_LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _request_of(starts, tile, num_requests, TOKENS: tl.constexpr):
    """The request whose tokens are in this tile; request i begins at tile starts[i] // TOKENS + i.

    So tiles need no table: a request is given one more than it may need (as in vLLM's kernel).
    """
    low = 0
    high = num_requests
    while low < high:
        middle = (low + high) // 2
        if tl.load(starts + middle) // TOKENS + middle <= tile:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit(do_not_specialize=["num_requests", "table_width", "window"])
def _attend(
    query, keys, values, out, stats, starts, key_counts, blocks,
    num_requests, table_width, scale, window, softcap,
    GROUP: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr, TOKENS: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, PAGE: tl.constexpr, PARTS: tl.constexpr,
    IS_DECODE: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A tile of tokens of one request, the heads of one KV head, a part of the keys.

    A row of the tile is a token and one of the GROUP heads. With PARTS > 1 `out` is
    [tokens * heads, PARTS, DIM] in fp32 and `stats` the log2 of each part's sum of exponentials.
    """
    tile, kv_head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_kv_heads = tl.num_programs(1)
    follow(EARLY)
    lead(EARLY)
    if IS_DECODE:
        request = tile
        start = tile
        count = 1
        first = 0
    else:
        request = _request_of(starts, tile, num_requests, TOKENS)
        start = tl.load(starts + request)
        count = tl.load(starts + request + 1) - start
        first = (tile - (start // TOKENS + request)) * TOKENS
        if first >= count:
            return
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, PADDED_DIM)
    token = first + row // GROUP
    is_row = (row < TOKENS * GROUP) & (token < count)
    is_dim = dim < DIM
    head = kv_head * GROUP + row % GROUP
    place = (start + token).to(tl.int64) * (num_kv_heads * GROUP) + head
    q = tl.load(
        query + place[:, None] * DIM + dim[None, :], mask=is_row[:, None] & is_dim[None, :], other=0
    )
    num_keys = tl.load(key_counts + request)
    position = num_keys - count + tl.where(is_row, token, first)
    stop = tl.minimum(num_keys, num_keys - count + first + TOKENS)
    begin = 0
    if HAS_WINDOW:
        begin = tl.maximum(num_keys - count + first - window + 1, 0) // KEYS * KEYS
    if PARTS > 1:
        share = tl.cdiv(tl.cdiv(stop - begin, KEYS), PARTS) * KEYS
        begin += part * share
        stop = tl.minimum(stop, begin + share)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, PADDED_DIM], tl.float32)
    for key_start in range(begin, stop, KEYS):
        key = key_start + tl.arange(0, KEYS)
        is_key = key < stop
        page = tl.load(blocks + request * table_width + key // PAGE, mask=is_key, other=0)
        line = (page.to(tl.int64) * PAGE + key % PAGE) * num_kv_heads + kv_head
        # What lies behind the last key is another's, or NaN: it is never loaded.
        inside = is_key[:, None] & is_dim[None, :]
        k = tl.load(keys + line[:, None] * DIM + dim[None, :], mask=inside, other=0)
        v = tl.load(values + line[:, None] * DIM + dim[None, :], mask=inside, other=0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if HAS_CAP:
            scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)  # tanh
        visible = (key[None, :] <= position[:, None]) & is_key[None, :]
        if HAS_WINDOW:
            visible &= key[None, :] > position[:, None] - window
        scores = tl.where(visible, scores * _LOG2E, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)  # nothing was visible yet
        weights = tl.exp2(scores - safe[:, None])
        shrink = tl.exp2(highest - safe)
        total = total * shrink + tl.sum(weights, 1)
        mixed = mixed * shrink[:, None]
        mixed = tl.dot(weights.to(v.dtype), v, mixed, input_precision="ieee")
        highest = higher
    divisor = tl.where(total > 0, total, 1.0)  # a part may have no keys: its highest is -inf
    result = mixed / divisor[:, None]
    if PARTS == 1:
        lines = out + place[:, None] * DIM + dim[None, :]
    else:
        lines = out + (place[:, None] * PARTS + part) * DIM + dim[None, :]
        tl.store(stats + place * PARTS + part, highest + tl.log2(divisor), mask=is_row)
    tl.store(lines, result.to(out.dtype.element_ty), mask=is_row[:, None] & is_dim[None, :])


@triton.jit
def _join(
    parts, stats, out, DIM: tl.constexpr, PADDED_DIM: tl.constexpr, PARTS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """One row of one head from its parts, weighted by their sums of exponentials."""
    follow(EARLY)
    lead(EARLY)
    place = tl.program_id(0).to(tl.int64)
    part, dim = tl.arange(0, PARTS), tl.arange(0, PADDED_DIM)
    stat = tl.load(stats + place * PARTS + part)
    weights = tl.exp2(stat - tl.max(stat, 0))
    # A part without keys has a weight of 0, and its values may be anything.
    inside = (weights > 0)[:, None] & (dim < DIM)[None, :]
    values = tl.load(
        parts + (place * PARTS + part[:, None]) * DIM + dim[None, :], mask=inside, other=0
    )
    result = tl.sum(values * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(out + place * DIM + dim, result.to(out.dtype.element_ty), mask=dim < DIM)


class TritonAttention:
    """One launch for any mix of prefills and decodes; two where a few decodes have long contexts.

    Then the keys of a request are cut into parts, so that a single request keeps the whole device
    busy; how many depends on the number of requests only, as a captured launch has a fixed shape.
    """

    block_size = 32
    can_graph = True

    def __init__(self, num_multiprocessors: int, *, early: bool = False) -> None:
        """With `early` kernels are launched while the one before still runs."""
        self._num_programs = _PROGRAMS_PER_SM * num_multiprocessors
        self._num_multiprocessors = num_multiprocessors
        self._launch = launch_options(early)

    def launched_early(self) -> "TritonAttention":
        """Returns the same attention, its kernels launched while the one before still runs."""
        return TritonAttention(self._num_multiprocessors, early=True)

    def __call__(
        self, step: PagedStep, rule: AttentionRule, query: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        """See PagedAttention."""
        shape, num_requests = rule.shape, len(step.key_counts)
        group = shape.num_heads // shape.num_kv_heads
        is_decode = step.max_count == 1
        least = triton.next_power_of_2(group)
        rows = max(least, _FEWEST_ROWS if is_decode else _ROWS)
        tokens = 1 if is_decode else rows // group
        tiles = num_requests if is_decode else len(query) // tokens + num_requests
        parts = self._num_parts(step, shape.num_kv_heads) if is_decode else 1
        padded = max(16, triton.next_power_of_2(shape.head_dim))
        out = query.new_empty(query.shape)
        target, stats = out, out
        if parts > 1:
            lines = len(query) * shape.num_heads
            target = query.new_empty((lines, parts, shape.head_dim), dtype=float32)
            stats = query.new_empty((lines, parts), dtype=float32)
        _attend[(tiles, shape.num_kv_heads, parts)](
            query, keys, values, target, stats, step.starts, step.key_counts, step.blocks,
            num_requests, step.blocks.stride(0), rule.scale, rule.window, rule.softcap,
            GROUP=group, DIM=shape.head_dim, PADDED_DIM=padded, TOKENS=tokens, ROWS=rows,
            KEYS=_KEYS, PAGE=self.block_size, PARTS=parts,
            IS_DECODE=is_decode, HAS_WINDOW=rule.window > 0, HAS_CAP=rule.softcap > 0,
            **self._launch,
        )  # fmt: skip
        if parts > 1:
            _join[(len(query) * shape.num_heads,)](
                target, stats, out, DIM=shape.head_dim, PADDED_DIM=padded, PARTS=parts,
                **self._launch,
            )  # fmt: skip
        return out

    def _num_parts(self, step: PagedStep, num_kv_heads: int) -> int:
        wanted = self._num_programs // (len(step.key_counts) * num_kv_heads)
        most = min(_MOST_PARTS, wanted, -(-step.max_keys // _KEYS))
        return 1 << max(most, 1).bit_length() - 1
