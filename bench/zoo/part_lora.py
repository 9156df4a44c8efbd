"""The parts that train LoRA with PEFT, on the data, batches and steps that RED has.

One model holds an adapter per task; PEFT's mixed batches apply each to its own rows, so that the
base is computed once for all tasks. Each adapter has its own optimizer, schedule and clipping.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import model as models
import torch
from examples import prompt
from part_red import choose
from plan import Part, Plan
from tasks import TASKS
from torch import Tensor, nn

from redmux_adapters.train import Example, TrainingBase, TrainingOptions
from redmux_adapters.train.objectives import GenerationObjective, Row
from redmux_adapters.train.options import rate_factor
from redmux_adapters.train.stream import BatchStream

_TEST_RESERVE_S = 40.0
_LOSS_STEPS = 5
TARGETS = ("q_proj", "v_proj")  # PEFT's default for Llama


class MixedLora:
    """A PEFT model as what `GenerationObjective` takes for a base model and for a bank."""

    def __init__(self, model: Any, rank: int, names: Sequence[str]) -> None:
        from peft import LoraConfig, get_peft_model

        self.names = list(names)
        config = LoraConfig(
            r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=list(TARGETS),
            task_type="CAUSAL_LM",
        )  # fmt: skip
        torch.manual_seed(0)
        self.peft = get_peft_model(model, config, adapter_name=self.names[0])
        for name in self.names[1:]:
            self.peft.add_adapter(name, config)
        self.peft.eval()  # there is no dropout; PEFT mixes adapters in this mode only
        for name, parameter in self.peft.named_parameters():
            parameter.requires_grad_("lora_" in name)
        self.values = next(self.peft.parameters())  # tells the device
        self.config = model.config
        self._rows: list[str] = []

    def parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        """Returns the weights of one task's adapter."""
        found = self.peft.named_parameters()
        return {key: value for key, value in found if f".{name}." in key and "lora_" in key}

    @contextmanager
    def editing(self, rows: Tensor) -> Iterator[None]:
        """Applies to each row of a batch the adapter of its number."""
        self._rows = [self.names[i] for i in rows.tolist()]
        try:
            yield
        finally:
            self._rows = []

    def get_output_embeddings(self) -> Any:
        """Returns the base model's output matrix."""
        return self.peft.get_base_model().get_output_embeddings()

    def __call__(self, **inputs: Any) -> Any:
        """Computes a batch, outside `editing` as the base model does."""
        if not self._rows:
            return self.peft(**inputs, adapter_names=["__base__"] * len(inputs["input_ids"]))
        return self.peft(**inputs, adapter_names=self._rows)


@dataclass
class _Learner:
    """One task's LoRA under training."""

    task: str
    row: int
    train: list[Example]
    valid: list[Example]
    options: TrainingOptions
    weights: dict[str, nn.Parameter]
    step: int = 0
    num_tokens: int = 0
    best: tuple[float, float, int] | None = None  # held-out loss, accuracy, step
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.weights.values(), lr=0.0, weight_decay=0.0)
        lengths = [e.length for e in self.train]
        self.stream = BatchStream(lengths, self.options.batch_size, self.options.seed)

    @property
    def is_active(self) -> bool:
        return self.step < (self.options.steps or 0)

    def next_rows(self) -> list[Row]:
        examples = [self.train[i] for i in self.stream.next()]
        weight = 1 / sum(len(e.targets) for e in examples)
        return [Row(self.row, e, weight) for e in examples]

    def update(self, rows: Sequence[Row]) -> float:
        """Takes an optimizer step; returns the loss before it."""
        rate = (self.options.learning_rate or 0.0) * rate_factor(
            self.options, self.step, self.options.steps or 1
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        nn.utils.clip_grad_norm_(self.weights.values(), self.options.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.num_tokens += sum(row.example.length for row in rows)
        return sum(row.loss * row.weight for row in rows)


def lora(plan: Plan, part: Part, rank: int, rate: float) -> None:
    """Trains a LoRA of this rank for every task, and scores it on the test texts."""
    model, tokenizer = models.load(plan.base, plan.device, plan.dtype)
    steps = plan.chosen_steps(plan.steps)
    mixed = MixedLora(model, rank, plan.tasks)
    # Not `TrainingBase.of`, which would freeze the LoRA weights.
    base = TrainingBase("", "causal", mixed, tokenizer, "")
    learners = []
    for row, task in enumerate(plan.tasks):
        train, valid = (plan.token_examples(tokenizer, task, s) for s in ("train", "valid"))
        options = plan.options(task, steps, rate)
        learners.append(_Learner(task, row, train, valid, options, mixed.parameters_of(task)))
    seconds = _train(plan, part, GenerationObjective(base, mixed, False), learners, rank, rate)  # type: ignore[arg-type]
    _note_runs(part, learners, rank, rate, seconds)
    part.save()
    best = {learner.task: learner.best_weights for learner in learners}
    del mixed, base, model
    if plan.device == "cuda":
        torch.cuda.empty_cache()
    model, tokenizer = models.load(plan.base, plan.device)
    _test(plan, part, MixedLora(model, rank, plan.tasks), tokenizer, best)


def _train(
    plan: Plan, part: Part, objective: GenerationObjective, learners: Sequence[_Learner],
    rank: int, rate: float,
) -> float:  # fmt: skip
    start = time.perf_counter()

    def note(learner: _Learner, split: str, loss: float, accuracy: float | None) -> None:
        part.curves.append({
            "task": learner.task, "method": f"LoRA r={rank}", "rate": f"{rate:g}",
            "step": learner.step, "split": split, "loss": loss, "accuracy": accuracy,
        })  # fmt: skip

    def evaluate(due: Sequence[_Learner]) -> None:
        rows = {learner.row: [Row(learner.row, e) for e in learner.valid] for learner in due}
        _run(objective, [row for own in rows.values() for row in own], plan, train=False)
        for learner in due:
            own = rows[learner.row]
            terms = sum(len(row.example.targets) for row in own)
            loss = sum(row.loss for row in own) / terms
            accuracy = sum(row.num_right for row in own) / terms
            note(learner, "valid", loss, accuracy)
            if learner.best is None or loss < learner.best[0]:
                learner.best = loss, accuracy, learner.step
                learner.best_weights = {
                    name: weight.detach().clone() for name, weight in learner.weights.items()
                }
        if due:
            part.save()
            step, seconds = max(x.step for x in learners), time.perf_counter() - start
            print(f"step {step}, {seconds:.1f} s", flush=True)

    evaluate(learners)
    while plan.remaining_s(_TEST_RESERVE_S) > 0:
        active = [learner for learner in learners if learner.is_active]
        if not active:
            break
        batches = {learner.row: learner.next_rows() for learner in active}
        _run(objective, [row for own in batches.values() for row in own], plan, train=True)
        for learner in active:
            learner.losses.append(learner.update(batches[learner.row]))
            if len(learner.losses) == _LOSS_STEPS:
                note(learner, "train", sum(learner.losses) / _LOSS_STEPS, None)
                learner.losses.clear()
        evaluate([
            learner for learner in active
            if not learner.is_active or learner.step % learner.options.eval_every == 0
        ])  # fmt: skip
    return time.perf_counter() - start


def _run(objective: GenerationObjective, rows: list[Row], plan: Plan, train: bool) -> None:
    """Computes rows in passes of bounded size, as `Trainer` does."""
    batch: list[Row] = []
    for row in sorted(rows, key=lambda row: row.example.length, reverse=True):
        if batch and (len(batch) + 1) * batch[0].example.length > plan.max_pass_tokens:
            objective.run(batch, train)
            batch = []
        batch.append(row)
    if batch:
        objective.run(batch, train)


def _note_runs(
    part: Part, learners: Sequence[_Learner], rank: int, rate: float, seconds: float
) -> None:
    all_tokens = sum(learner.num_tokens for learner in learners)
    for learner in learners:
        loss, accuracy, step = learner.best or (None, None, None)
        part.runs.append({
            "task": learner.task, "method": f"LoRA r={rank}", "rate": rate,
            "parameters": sum(weight.numel() for weight in learner.weights.values()),
            "steps": learner.step, "planned_steps": learner.options.steps,
            "batch_size": learner.options.batch_size,
            "examples": len(learner.train), "tokens": learner.num_tokens,
            "seconds": seconds * learner.num_tokens / max(1, all_tokens),
            "together": len(learners), "together_s": seconds,
            "ending": "cancelled" if learner.is_active else "completed",
            "valid_loss": loss, "valid_accuracy": accuracy, "best_step": step,
            "diverged": loss is None or loss != loss, "chosen": False, "scores": None,
        })  # fmt: skip
    choose(part.runs)


@torch.no_grad()
def _test(
    plan: Plan, part: Part, mixed: MixedLora, tokenizer: Any, best: dict[str, dict[str, Tensor]]
) -> None:
    for task in plan.tasks:
        for name, weight in mixed.parameters_of(task).items():
            weight.copy_(best[task][name])
    for run in part.runs:
        task = run["task"]
        examples = plan.examples(task, "test")
        mixed.peft.set_adapter(task)
        outputs = models.generate(
            mixed.peft, tokenizer, [prompt(e.user) for e in examples], plan.answer_tokens(task)
        )
        run["scores"], run["n"] = TASKS[task].score(examples, outputs), len(examples)
        part.keep_outputs(task, f"{run['method']}|{run['rate']:g}", outputs)
        part.save()
        print(task, run["method"], run["rate"], run["scores"], flush=True)
