"""LoRA by PEFT under the project's own trainer: the same batches, schedule, clipping and choice."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from redmux_adapters.train import Task, Trainer, TrainingBase
from redmux_adapters.train.bank import VectorBank
from redmux_adapters.train.classifier import ClassifierObjective, TrainedHead
from redmux_adapters.train.learner import Learner
from redmux_adapters.train.objectives import GenerationObjective


class LoraBank(VectorBank):
    """The LoRA weights of K adapters as rows, where training expects scales and biases.

    The weights of adapter i in PEFT's model are views of `values[i]`. PEFT's mixed batches apply
    each to its own rows of a batch, so that the base is computed once for all.
    """

    def __init__(self, model: Any, seeds: Sequence[int], rank: int, targets: Sequence[str]) -> None:
        """Draws each adapter from its own seed; alpha is twice the rank, nothing is dropped."""
        config = LoraConfig(
            r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=list(targets)
        )
        torch.manual_seed(seeds[0])
        self.peft: Any = get_peft_model(model, config, adapter_name=_name(0))
        for row, seed in enumerate(seeds[1:], 1):
            torch.manual_seed(seed)
            self.peft.add_adapter(_name(row), config)
        self.peft.eval()  # there is no dropout; PEFT mixes adapters in this mode only
        self._names: list[str] = []  # of the adapters of the batch that is computed
        self.peft.requires_grad_(False)
        own = [self.weights(row) for row in range(len(seeds))]
        size = sum(weight.numel() for weight in own[0].values())
        device = next(self.peft.parameters()).device
        self.values = torch.zeros(len(seeds), size, device=device)  # [K, weights of an adapter]
        self.grads = torch.zeros_like(self.values)
        for row, weights in enumerate(own):
            start = 0
            for weight in weights.values():
                place = slice(start, start := start + weight.numel())
                view = self.values[row, place].view_as(weight)
                weight.data = view.copy_(weight)
                weight.grad = self.grads[row, place].view_as(weight)
                weight.requires_grad_()

    def weights(self, row: int) -> dict[str, torch.nn.Parameter]:
        """Returns the weights of one adapter by their paths in the model."""
        found = self.peft.named_parameters()
        return {path: weight for path, weight in found if f".{_name(row)}." in path}

    def activate(self, row: int) -> None:
        """Applies one adapter to all that `peft` computes by itself, as in a generation."""
        self.peft.set_adapter(_name(row))

    def close(self) -> None:
        """Takes LoRA off the base again."""
        self.peft.unload()

    @contextmanager
    def editing(self, rows: Tensor, inside: Tensor | None = None) -> Iterator[None]:
        """Applies to each row of a batch the adapter of its number, which is for all tokens."""
        assert inside is None
        self._names = [_name(row) for row in rows.tolist()]
        try:
            yield
        finally:
            self._names = []

    def mask(self, sites: Mapping[str, int], part: str) -> Tensor:
        """Returns that every weight is trained."""
        return torch.ones(self.values.shape[1], dtype=torch.bool, device=self.values.device)

    def __call__(self, **inputs: Any) -> Any:
        """Computes a batch, outside `editing` as the base model does."""
        names = self._names or ["__base__"] * len(inputs["input_ids"])
        return self.peft(**inputs, adapter_names=names)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.peft.get_base_model(), name)


def _name(row: int) -> str:
    return f"adapter{row}"  # a module's name, in the paths of its weights


class _LearnerWithoutBaseline(Learner):
    wants_baseline = False


class LoraTrainer(Trainer):
    """Trains a LoRA for every task in shared passes; the base is the trainer's until `close`."""

    def __init__(
        self,
        base: TrainingBase,
        tasks: Sequence[Task],
        rank: int,
        targets: Sequence[str],
        *,
        max_pass_tokens: int,
        has_baseline: bool = True,
    ) -> None:
        """`has_baseline` says whether a task's untrained weights may be its best ones."""
        # Not the parent's, which lays out a bank of scales and biases.
        self.bank = self._bank = LoraBank(
            base.model, [task.options.seed for task in tasks], rank, targets
        )
        self.base = replace(base, model=self.bank)
        self._max_pass_tokens = max_pass_tokens
        self._heads = []
        if base.kind == "classifier":
            self._heads = [
                TrainedHead(self.base, t.options.head, t.labels, t.options.seed) for t in tasks
            ]
            self._objective = ClassifierObjective(self.base, self.bank, self._heads)
        else:
            self._objective = GenerationObjective(self.base, self.bank)
        heads: Sequence[TrainedHead | None] = self._heads or [None] * len(tasks)
        kind = Learner if has_baseline else _LearnerWithoutBaseline
        self.learners = [
            kind(task, row, self.bank, {}, head)
            for row, (task, head) in enumerate(zip(tasks, heads, strict=True))
        ]
