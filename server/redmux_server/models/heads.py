"""The classification heads of a batch, each of them an adapter's own, in batched products."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from redmux_adapters import Head, HeadConfig
from redmux_adapters.head import KINDS

# Rows of one batch element. A product of this shape gives a row the same bits wherever it stands
# and however many there are; one that fits the number of requests would not.
_ROWS = 8
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
    """Applies heads in fp32, those of one kind and number of labels in one batched product.

    Requests with the same head share its weights, up to eight to a copy.
    """

    def __init__(self, hidden_size: int, pooler: nn.Module | None, device: torch.device) -> None:
        """`pooler` is the base model's own, which heads of kind "bert" stand on."""
        self._hidden_size = hidden_size
        self._pooler = pooler
        self._device = device

    @property
    def kinds(self) -> list[str]:
        """The kinds of heads that this model can have."""
        return [kind for kind in KINDS if kind != "bert" or self._pooler is not None]

    def logits(self, heads: Sequence[Head], states: Sequence[Tensor]) -> list[Tensor]:
        """Returns the logits [labels] of each request from its hidden states [tokens, hidden].

        `heads` holds the head of each request.
        """
        groups: dict[tuple[str, int], list[int]] = {}
        for i, head in enumerate(heads):
            groups.setdefault(_shape(head.config), []).append(i)
        found: dict[int, Tensor] = {}
        for (kind, _), rows in groups.items():
            pooled = torch.stack([_pooled(kind, states[i]) for i in rows])
            logits = self._apply(kind, [heads[i] for i in rows], pooled)
            found.update(zip(rows, logits, strict=True))
        return [found[i] for i in range(len(heads))]

    def _apply(self, kind: str, heads: Sequence[Head], pooled: Tensor) -> list[Tensor]:
        if kind == "bert":
            assert self._pooler is not None, "see `kinds`"
            pooled = self._pooler(pooled[:, None])  # it takes sequences, and their first tokens
        slabs = _slabs(heads)
        x = torch.zeros(len(slabs), _ROWS, self._hidden_size, device=self._device)
        for slab, rows in enumerate(slabs):
            x[slab, : len(rows)] = pooled[rows].float()
        distinct = [heads[rows[0]] for rows in slabs]
        if kind in _HIDDEN:
            name, activation = _HIDDEN[kind]
            x = activation(self._product(distinct, name, x))
        x = self._product(distinct, _OUTPUT[kind], x)
        places = {i: (slab, row) for slab, rows in enumerate(slabs) for row, i in enumerate(rows)}
        return [x[places[i]] for i in range(len(heads))]

    def _product(self, heads: Sequence[Head], name: str, x: Tensor) -> Tensor:
        """Returns [slabs, rows, out] of x [slabs, rows, in], each slab by its own head's layer."""
        weight, bias = (
            torch.stack([head.tensors[f"{name}.{part}"] for head in heads]).to(self._device)
            for part in ("weight", "bias")
        )
        return torch.bmm(x, weight.transpose(1, 2)) + bias[:, None]


def _pooled(kind: str, states: Tensor) -> Tensor:
    return states.mean(0) if kind == "mean" else states[0]


def _shape(config: HeadConfig) -> tuple[str, int]:
    return config.kind, len(config.labels)


def _slabs(heads: Sequence[Head]) -> list[list[int]]:
    """Returns the indices of the requests of each slab, which all have the same head."""
    rows_of: dict[int, list[int]] = {}
    for i, head in enumerate(heads):
        rows_of.setdefault(id(head), []).append(i)
    return [
        rows[start : start + _ROWS]
        for rows in rows_of.values()
        for start in range(0, len(rows), _ROWS)
    ]
