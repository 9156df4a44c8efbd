"""Heads under training, and the loss of texts that are labelled or scored by them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from redmux.errors import InvalidArgumentError

from ..format.head import KINDS, Head, HeadConfig
from .bank import VectorBank
from .base import TrainingBase
from .objectives import Row
from .padded import attention_mask, padded, precision

_FIRST_TOKEN_DENSE = ("roberta", "xlm-roberta", "camembert", "mpnet", "xlm-roberta-xl")
_SCORE_NAME = "score"  # of the one output of a head that scores


class TrainedHead:
    """The classification head of one adapter, fp32, drawn from its seed alone.

    Without labels it has one output, a score, and learns by squared error.
    """

    def __init__(self, base: TrainingBase, kind: str, labels: Sequence[str], seed: int) -> None:
        model = base.model
        kind = _default_kind(model) if kind == "auto" else kind
        if kind == "bert" and getattr(model, "pooler", None) is None:
            raise InvalidArgumentError(
                "a head of kind 'bert' stands on a pooler, which this base model has not; use mean "
                "or roberta"
            )
        problem = "single_label_classification" if labels else "regression"
        self.config = HeadConfig(kind, tuple(labels) or (_SCORE_NAME,), problem)
        self.pooler: nn.Module | None = model.pooler if kind == "bert" else None
        device = next(model.parameters()).device
        config = model.config
        sizes = {"h": config.hidden_size, "l": len(self.config.labels)}
        drawn = torch.Generator().manual_seed(seed)
        std = getattr(config, "initializer_range", 0.02)
        self.parameters: dict[str, nn.Parameter] = {}
        for name, letters in KINDS[kind].items():
            values = torch.zeros([sizes[letter] for letter in letters])
            if name.endswith("weight"):
                values.normal_(0.0, std, generator=drawn)
            self.parameters[name] = nn.Parameter(values.to(device))
            self.parameters[name].grad = torch.zeros_like(self.parameters[name])

    def logits(self, states: Tensor, mask: Tensor) -> Tensor:
        """Returns [batch, labels] of hidden states [batch, tokens, hidden] under a mask of 0, 1."""
        kind = self.config.kind
        if kind == "mean":
            pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            return self._layer("classifier", pooled)
        if self.pooler is not None:
            pooled = self.pooler(states).float()
            return self._layer("classifier", pooled)
        if kind == "distilbert":
            return self._layer("classifier", self._layer("pre_classifier", states[:, 0]).relu())
        activation = F.gelu if kind == "electra" else torch.tanh
        return self._layer("out_proj", activation(self._layer("dense", states[:, 0])))

    def head(self, tensors: Mapping[str, Tensor]) -> Head:
        """Returns the head of an adapter with these values of the parameters."""
        return Head(self.config, {name: tensors[name] for name in self.parameters})

    @torch.no_grad()
    def take(self, head: Head) -> None:
        """Sets the values to those of an adapter's head of the same labels.

        Raises InvalidArgumentError for a head of another kind or size.
        """
        sizes = {name: list(values.shape) for name, values in self.parameters.items()}
        theirs = {name: list(values.shape) for name, values in head.tensors.items()}
        if head.config.kind != self.config.kind or sizes != theirs:
            raise InvalidArgumentError(
                f"the adapter to start from has a head of kind {head.config.kind!r} and shapes "
                f"{theirs}; here it is {self.config.kind!r} and {sizes}"
            )
        for name, values in head.tensors.items():
            self.parameters[name].copy_(values)

    def _layer(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.parameters[f"{name}.weight"], self.parameters[f"{name}.bias"])


class ClassifierObjective:
    """Cross-entropy over labels, or squared error of scores, of an encoder's texts."""

    pads = True  # as `GenerationObjective.pads` has it

    def __init__(
        self,
        base: TrainingBase,
        bank: VectorBank,
        heads: Sequence[TrainedHead],
        autocast: bool = False,
    ) -> None:
        self._model: Any = base.model
        self._bank = bank
        self._heads = heads
        self._autocast = autocast
        self._device = bank.values.device
        self._pad = base.model.config.pad_token_id or 0
        embeddings = getattr(base.model.embeddings, "token_type_embeddings", None)
        self._has_types = embeddings is not None and embeddings.num_embeddings > 1

    def run(self, rows: Sequence[Row], train: bool) -> None:
        """Computes the rows' losses and, if `train`, adds gradients to the bank and the heads."""
        lengths = [len(row.example.inputs) for row in rows]
        ids = padded([row.example.inputs for row in rows], self._pad).to(self._device)
        mask = attention_mask(lengths, ids.shape[1]).to(self._device)
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self._has_types:
            types = [row.example.types or (0,) * len(row.example.inputs) for row in rows]
            inputs["token_type_ids"] = padded(types, 0).to(self._device)
        adapters = torch.tensor([row.adapter for row in rows], device=self._device)
        with torch.set_grad_enabled(train):
            with self._bank.editing(adapters), precision(self._device, self._autocast):
                states = self._model(**inputs).last_hidden_state
            total = torch.zeros((), device=self._device)
            for adapter in sorted({row.adapter for row in rows}):
                places = [i for i, row in enumerate(rows) if row.adapter == adapter]
                own = [rows[i] for i in places]
                logits = self._heads[adapter].logits(states[places].float(), mask[places])
                total = total + self._loss(adapter, own, logits)
        if train:
            total.backward()  # type: ignore[no-untyped-call]

    def _loss(self, adapter: int, rows: Sequence[Row], logits: Tensor) -> Tensor:
        """Notes the results of one adapter's rows and returns their weighted loss."""
        labels = [row.example.label for row in rows]
        weights = torch.tensor([row.weight for row in rows], device=self._device)
        if self._heads[adapter].config.problem_type == "regression":
            targets = torch.tensor(labels, device=self._device)
            losses = trained = (logits[:, 0] - targets) ** 2
            right = [0] * len(rows)
            predicted = logits[:, 0].tolist()
        else:
            classes = torch.tensor(labels, device=self._device).long()
            losses = F.cross_entropy(logits, classes, reduction="none")
            smoothing = rows[0].smoothing
            trained = F.cross_entropy(logits, classes, reduction="none", label_smoothing=smoothing)
            likeliest = logits.argmax(-1)
            right = (likeliest == classes).long().tolist()
            predicted = likeliest.tolist()
        for row, *found in zip(rows, losses.tolist(), right, predicted, strict=True):
            row.loss, row.num_right, row.predicted = found
        return (trained * weights).sum()


def _default_kind(model: Any) -> str:
    """Returns the kind of head that transformers gives such a model, the mean where it has none."""
    model_type = model.config.model_type
    if model_type in _FIRST_TOKEN_DENSE:
        return "roberta"
    if model_type in ("distilbert", "electra"):
        return str(model_type)
    return "mean" if getattr(model, "pooler", None) is None else "bert"
