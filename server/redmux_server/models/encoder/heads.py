"""The classification heads of a batch, each of them an adapter's own."""

from collections.abc import Callable, Sequence
from typing import Any

import numba
import numpy as np
import torch
import torch.nn.functional as F
from numba import prange
from torch import Tensor

from redmux_adapters import Head
from redmux_adapters.format.head import KINDS
from redmux_server.models.cpu.compiled import compiled
from redmux_server.models.cpu.folds import dot

# The layer before the one that puts out the labels, if the head brings it, and what follows it.
_HIDDEN: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "roberta": ("dense", torch.tanh),
    "electra": ("dense", F.gelu),
    "distilbert": ("pre_classifier", torch.relu),
}
_OUTPUT = {
    "roberta": "out_proj", "electra": "out_proj", "distilbert": "classifier",
    "bert": "classifier", "mean": "classifier",
}  # fmt: skip


class Heads:
    """Applies heads in fp32 on the CPU, where their weights are, whatever the device of the model.

    Requests with the same head share a pass over its weights. Every value is a sum in one fixed
    order, so a request's logits have the same bits in any company.
    """

    def __init__(self, pooler: Any) -> None:
        """`pooler` is the base model's own, which heads of kind "bert" stand on; None for none."""
        self._pooler = pooler

    @property
    def kinds(self) -> list[str]:
        """The kinds of heads that this model can have."""
        return [kind for kind in KINDS if kind != "bert" or self._pooler is not None]

    def logits(self, heads: Sequence[Head], states: Sequence[Tensor]) -> list[Tensor]:
        """Returns the logits [labels] of each request from its hidden states [tokens, hidden].

        `heads` holds the head of each request.
        """
        rows_of: dict[int, list[int]] = {}
        for i, head in enumerate(heads):
            rows_of.setdefault(id(head), []).append(i)
        found: dict[int, Tensor] = {}
        for rows in rows_of.values():
            head = heads[rows[0]]
            pooled = torch.stack([_pooled(head.config.kind, states[i]) for i in rows])
            found.update(zip(rows, self._apply(head, pooled), strict=True))
        return [found[i] for i in range(len(heads))]

    def _apply(self, head: Head, pooled: Tensor) -> Tensor:
        """Returns the logits [rows, labels] of rows [rows, hidden] by one head."""
        kind = head.config.kind
        if kind == "bert":
            assert self._pooler is not None, "see `kinds`"
            pooled = _by_row(self._pooler.activation, self._pooler.dense(pooled))
        x = pooled.float().cpu()
        if kind in _HIDDEN:
            name, activation = _HIDDEN[kind]
            x = _by_row(activation, _product(head, name, x))
        return _product(head, _OUTPUT[kind], x)


def _pooled(kind: str, states: Tensor) -> Tensor:
    return states.mean(0) if kind == "mean" else states[0]


def _by_row(activation: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    # Of several rows at once torch computes the last elements in another way than the others.
    return torch.stack([activation(row) for row in x])


def _product(head: Head, name: str, x: Tensor) -> Tensor:
    """Returns [rows, out] of x [rows, in] by this layer of the head."""
    weight, bias = (head.tensors[f"{name}.{part}"].numpy() for part in ("weight", "bias"))
    out = np.empty((len(x), len(bias)), np.float32)
    _multiply(numba.get_num_threads(), x.contiguous().numpy(), weight, bias, out)
    return torch.from_numpy(out)


@compiled(parallel=True)
def _multiply(num_threads, x, weight, bias, out):  # type: ignore[no-untyped-def]
    """Fills out = x @ weight.T + bias; threads share the outputs."""
    num_outputs = len(weight)
    for thread in prange(num_threads):
        first = num_outputs * thread // num_threads
        stop = num_outputs * (thread + 1) // num_threads
        for o in range(first, stop):
            for r in range(len(x)):
                out[r, o] = dot(x[r], weight[o]) + bias[o]
