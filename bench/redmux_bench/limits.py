"""What this machine allows a step at best: its products alone, and its memory's bandwidth."""

import time
from collections.abc import Sequence

import numba
import numpy as np
import torch
from numba import prange
from torch import Tensor, nn

from redmux_server.models.base_model import BaseModel
from redmux_server.models.cpu.compiled import compiled
from redmux_server.models.cpu.folds import LANES, total
from redmux_server.models.cpu.packed_linear import PackedLinear, products
from redmux_server.models.cpu.vector import Array

_BANDWIDTH_BYTES = 512 << 20  # far beyond any cache
_BANDWIDTH_TRIES = 10


def read_bandwidth() -> float:
    """Returns the bytes per second that summing a large array reads, with all threads set.

    The best of several tries: whatever disturbs one only makes it slower.
    """
    threads = numba.get_num_threads()
    shares = np.ones((threads, _BANDWIDTH_BYTES // 4 // threads // LANES * LANES), np.float32)
    best_s = min(_timed(shares) for _ in range(_BANDWIDTH_TRIES))
    return shares.nbytes / best_s


def _timed(shares: Array) -> float:
    sums = np.empty(len(shares), np.float32)
    started_s = time.perf_counter()
    _read(shares, sums)
    return time.perf_counter() - started_s


@compiled(parallel=True)
def _read(shares, sums):  # type: ignore[no-untyped-def]
    for thread in prange(len(shares)):
        sums[thread] = total(shares[thread])


class LinearFloor:
    """The matrix products of a loaded model, run one after the other on inputs of their own.

    Nothing is computed between them, not even a row rounded, and each reads a weight that the
    caches have lost since its last turn, as in a step. The head, which a step computes only for
    rows that sample, is apart.
    """

    def __init__(self, model: BaseModel) -> None:
        self._layers = [m for m in model.linears if m.out_features != model.vocab_size]
        self._head = [m for m in model.linears if m.out_features == model.vocab_size]

    def seconds(self, rows: int, head_rows: int) -> float:
        """Returns how long the products take for a step of this many rows, and of the head's."""
        groups = [(self._layers, rows)] + [(self._head, head_rows)] * (head_rows > 0)
        return sum(self._seconds(modules, count) for modules, count in groups)

    @torch.inference_mode()
    def _seconds(self, modules: Sequence[nn.Module], rows: int) -> float:
        packed = [m for m in modules if isinstance(m, PackedLinear)]
        packings = {id(m.packing): m.packing for m in packed}
        if len(packed) == len(modules) and len(packings) == 1:
            run = products(packed[0].packing, [m.index for m in packed], rows)
            started_s = time.perf_counter()
            run()
            return time.perf_counter() - started_s
        pairs = _with_inputs(modules, rows)
        started_s = time.perf_counter()
        for module, x in pairs:
            module.forward(x)  # not called, so that no hook edits the result
        return time.perf_counter() - started_s


def _with_inputs(modules: Sequence[nn.Module], rows: int) -> list[tuple[nn.Module, Tensor]]:
    inputs: dict[int, Tensor] = {}
    pairs = []
    for module in modules:
        size = int(module.in_features)  # type: ignore[arg-type]
        if size not in inputs:
            inputs[size] = torch.randn(1, rows, size)
        pairs.append((module, inputs[size]))
    return pairs
