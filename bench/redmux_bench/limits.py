"""What this machine allows a step at best: its products alone, and its memory's bandwidth."""

import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from redmux_server.models.load import BaseModel

_BANDWIDTH_BYTES = 512 << 20  # far beyond any cache
_BANDWIDTH_TRIES = 10


def read_bandwidth() -> float:
    """Returns the bytes per second that summing a large array reads, with all threads set.

    The best of several tries: whatever disturbs one only makes it slower.
    """
    array = torch.ones(_BANDWIDTH_BYTES // 4)
    best_s = min(_timed(array) for _ in range(_BANDWIDTH_TRIES))
    return array.nbytes / best_s


def _timed(array: Tensor) -> float:
    started_s = time.perf_counter()
    array.sum()
    return time.perf_counter() - started_s


class LinearFloor:
    """The matrix products of a loaded model, run one after the other on inputs of their own.

    Nothing is computed between them, and each reads a weight that the caches have lost since its
    last turn, as in a step. The head, which a step computes only for rows that sample, is apart.
    """

    def __init__(self, model: BaseModel) -> None:
        self._layers = [m for m in model.linears if m.out_features != model.vocab_size]
        self._head = [m for m in model.linears if m.out_features == model.vocab_size]

    @torch.inference_mode()
    def seconds(self, rows: int, head_rows: int) -> float:
        """Returns how long the products take for a step of this many rows, and of the head's."""
        layers = _with_inputs(self._layers, rows)
        head = _with_inputs(self._head, head_rows) if head_rows else []
        started_s = time.perf_counter()
        for module, x in (*layers, *head):
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
