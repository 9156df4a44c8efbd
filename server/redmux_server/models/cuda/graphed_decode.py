"""Decode steps as captured CUDA graphs: one launch instead of hundreds."""

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from redmux_server.engine.bank import IDENTITY
from redmux_server.models.cuda.decode_ways import Chosen, Replay, Seconds, choose_way
from redmux_server.models.cuda.decoder import DecodeWay, StepTensors
from redmux_server.models.cuda.paged_cache import PagedKVCache
from redmux_server.models.cuda.paged_step import HostIndex, Ints, PagedStep, split, staged

# Takes what launches the work of a step and returns what launches it again.
Capture = Callable[[Callable[[], None]], Replay]


class CudaCapture:
    """Captures into CUDA graphs that share one memory pool."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def __call__(self, launch: Callable[[], None]) -> Callable[[], None]:
        """Warms up, so that every kernel is compiled and every workspace there, then captures."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            launch()
            launch()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            launch()
        return graph.replay


def batch_sizes(max_running: int) -> list[int]:
    """Returns the sizes to capture: powers of two, and the largest batch itself."""
    sizes = [1 << i for i in range(max_running.bit_length()) if 1 << i < max_running]
    return [*sizes, max_running]


class GraphedDecode:
    """Steps of one token per request, replayed from graphs captured per batch size.

    Every size is captured in each of the given ways and keeps the fastest.
    A step is padded to the next captured size. Padded rows are the identity row of the bank and
    one key in the cache's dummy block, so they reach no request. Everything that changes between
    steps is data in static buffers: tokens, positions, cache slots, block tables, lengths and the
    adapters' rows. What a graph holds by address must stay: the weights, the cache, and the bank's
    table; when the table moves, the owner makes a new GraphedDecode.

    `capture` decides what a graph is; nothing else in here knows of CUDA.
    """

    def __init__(
        self,
        cache: PagedKVCache,
        ways: Sequence[DecodeWay],
        table: Tensor,
        capture: Capture,
        seconds: Seconds,
        *,
        sizes: Sequence[int],
        max_blocks: int,
        vocab_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Captures every size, the largest first, as later ones then fit into its memory.

        `table` is the bank's, which the ways read; `seconds` times them, where there are several.
        `max_blocks` bounds the cache blocks of a request, `vocab_size` is the width of the logits.
        """
        self._cache = cache
        self._sizes = sorted(sizes)
        max_keys = max_blocks * cache.block_size
        self._logits = torch.zeros((self._sizes[-1], vocab_size), device=device, dtype=dtype)
        self._steps: dict[int, tuple[_StaticStep, Replay]] = {}
        self.chosen: dict[int, Chosen] = {}
        for size in reversed(self._sizes):
            step = _StaticStep(_dummies(size, cache), max_blocks, max_keys, device)
            captured = functools.partial(self._captured, capture, step, table)
            replay, self.chosen[size] = choose_way(
                ways, size, captured, self._logits[:size], seconds
            )
            self._steps[size] = step, replay

    def fits(self, num_requests: int) -> bool:
        """Whether some captured size has room for this many requests."""
        return num_requests <= self._sizes[-1]

    def run(self, ids: Ints, positions: Ints, rows: Ints, host: HostIndex) -> Tensor:
        """Computes a step of decodes and returns its logits [requests, vocab], the caller's own.

        ids, positions and rows are int32 [requests]; `host` describes the same requests.
        """
        size = next(size for size in self._sizes if size >= len(ids))
        step, replay = self._steps[size]
        padded = _padded(host, _dummies(size - len(ids), self._cache))
        step.load(ids, positions, rows, padded)
        replay()
        return self._logits[: len(ids)].clone()

    def _captured(
        self, capture: Capture, step: "_StaticStep", table: Tensor, way: DecodeWay
    ) -> Replay:
        def launch() -> None:
            step.cast()
            self._logits[: step.size].copy_(way.logits(step.tensors, table))

        return capture(launch)


class _StaticStep:
    """The buffers that the graph of one batch size reads, filled by one copy."""

    def __init__(self, host: HostIndex, width: int, max_keys: int, device: torch.device) -> None:
        """`host` is all padding; `width` is that of the block table on the device."""
        n = self.size = len(host.counts)
        self._width = width
        shapes: list[tuple[int, ...]] = [(3, n), (n,), (n + 1,), (n,), (n, width)]
        self._flat = torch.zeros(sum(map(math.prod, shapes)), dtype=torch.int32, device=device)
        self._ints, rows, starts, key_counts, blocks = split(self._flat, shapes)
        self._longs = torch.zeros((3, n), dtype=torch.int64, device=device)
        ids, positions, slots = self._longs
        paged = PagedStep(
            host, slots, starts, key_counts, blocks,
            max_count=1, max_keys=max_keys, is_static=True,
        )  # fmt: skip
        self.tensors = StepTensors(ids, positions, rows, paged, None)
        self.load(*(np.zeros(0, np.int32),) * 3, host)

    def load(self, ids: Ints, positions: Ints, rows: Ints, host: HostIndex) -> None:
        """Fills the buffers: `host` is padded to the size, the rest is padded here."""
        ids, positions, rows = (_filled(x, self.size) for x in (ids, positions, rows))
        slots, *index, blocks = host.arrays()
        table = np.zeros((self.size, self._width), np.int32)
        width = min(self._width, blocks.shape[1])
        table[:, :width] = blocks[:, :width]
        arrays = [ids, positions, slots, rows, *index, table]
        self._flat.copy_(staged(arrays, self._flat.device), non_blocking=True)

    def cast(self) -> None:
        """Widens what torch wants as int64; part of the graph."""
        self._longs.copy_(self._ints)


def _filled(values: Ints, size: int) -> Ints:
    """Padded rows have token 0, position 0 and the bank's identity row, which is row 0."""
    assert IDENTITY == 0
    return np.concatenate([values, np.zeros(size - len(values), np.int32)])


def _dummies(n: int, cache: PagedKVCache) -> HostIndex:
    """Returns n padded rows: one key each, at the start of the dummy block."""
    ones = np.ones(n, np.int32)
    blocks = np.full((n, 1), cache.dummy_block, np.int32)
    return HostIndex(n, ones, ones, blocks, blocks[:, 0] * np.int32(cache.block_size))


def _padded(host: HostIndex, dummies: HostIndex) -> HostIndex:
    """Returns the decodes of `host` and then the padding."""
    table = np.zeros((len(dummies.counts), host.blocks.shape[1]), np.int32)
    table[:, :1] = dummies.blocks
    return HostIndex(
        host.num_decodes + dummies.num_decodes,
        np.concatenate([host.counts, dummies.counts]),
        np.concatenate([host.key_counts, dummies.key_counts]),
        np.concatenate([host.blocks, table]),
        np.concatenate([host.slots, dummies.slots]),
    )
