"""What all parts that train share: variants in shared passes, their losses, the best rates."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import model as models
from examples import PROMPT, prompt
from plan import Part, Plan
from tasks import TASKS

from redmux_adapters import AdapterMetadata
from redmux_adapters.train import Evaluated, Stepped, Task, Trainer, TrainingBase
from redmux_adapters.train.learner import Learner

BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
_TEST_RESERVE_S = 45.0  # before the deadline, for the answers to the test texts
_LOSS_STEPS = 5  # training losses are averaged over so many steps for the curves


@dataclass(frozen=True)
class Variant:
    """One adapter to train."""

    task: str
    method: str
    rate: float
    changes: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the trainer's task."""
        return f"{self.task}|{self.method}|{self.rate:g}"


def load_base(plan: Plan) -> TrainingBase:
    """Returns the base as it is trained on."""
    model, tokenizer = models.load(plan.base, plan.device, plan.dtype)
    return TrainingBase.of(model, tokenizer, BASE_NAME)


def trainer_tasks(
    plan: Plan, base: TrainingBase, variants: Sequence[Variant], steps: int
) -> list[Task]:
    """Returns the trainer's task of each variant."""
    splits = {
        (task, split): plan.token_examples(base.tokenizer, task, split)
        for task in dict.fromkeys(variant.task for variant in variants)
        for split in ("train", "valid")
    }
    tasks = []
    for variant in variants:
        task = TASKS[variant.task]
        about = AdapterMetadata(
            description=task.description, license=task.license, training_data=task.training_data,
            created_by="bench/zoo/run.py",
        )  # fmt: skip
        options = plan.options(variant.task, steps, variant.rate, **variant.changes)
        train, valid = splits[variant.task, "train"], splits[variant.task, "valid"]
        tasks.append(Task(variant.name, train, options, valid, PROMPT, (), about))
    return tasks


def train(
    plan: Plan,
    part: Part,
    trainer: Trainer,
    variants: Sequence[Variant],
    num_parameters: Callable[[Learner], int],
) -> None:
    """Trains to the end, or until there is just time for the test, and notes every training."""
    start, losses = time.perf_counter(), {}
    while trainer.active:
        events = trainer.step()
        for event in events:
            if not isinstance(event, Stepped | Evaluated):
                continue
            point = dict(zip(("task", "method", "rate"), event.task.split("|"), strict=True))
            point |= {"step": event.step}
            if isinstance(event, Evaluated):
                part.curves.append(
                    point | {"split": "valid", "loss": event.loss, "accuracy": event.accuracy}
                )
                continue
            recent = losses.setdefault(event.task, [])
            recent.append(event.loss)
            if len(recent) == _LOSS_STEPS:
                loss = sum(recent) / len(recent)
                part.curves.append(point | {"split": "train", "loss": loss, "accuracy": None})
                recent.clear()
        if any(isinstance(event, Evaluated) for event in events):
            part.save()
            step = max(learner.step for learner in trainer.learners)
            print(f"step {step}, {time.perf_counter() - start:.1f} s", flush=True)
        if plan.remaining_s(_TEST_RESERVE_S) < 0:
            for learner in trainer.active:
                trainer.cancel(learner.task.name)
    seconds = time.perf_counter() - start
    all_tokens = sum(learner.num_tokens for learner in trainer.learners)
    for variant, learner in zip(variants, trainer.learners, strict=True):
        part.runs.append({
            "task": variant.task, "method": variant.method, "rate": variant.rate,
            "parameters": num_parameters(learner),
            "steps": learner.step, "planned_steps": learner.task.num_steps,
            "batch_size": learner.task.options.batch_size,
            "examples": len(learner.task.train), "tokens": learner.num_tokens,
            "seconds": seconds * learner.num_tokens / max(1, all_tokens),
            "together": len(variants), "together_s": seconds, "ending": learner.ending,
            "valid_loss": learner.best.loss if learner.best else None,
            "valid_accuracy": learner.best.accuracy if learner.best else None,
            "best_step": learner.best.step if learner.best else None,
            "diverged": learner.ending == "diverged", "chosen": False, "scores": None,
        })  # fmt: skip
    choose(part.runs)
    part.save()


def choose(runs: Sequence[dict[str, Any]]) -> None:
    """Marks the run with the lowest held-out loss of every task and method."""
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for run in runs:
        key = run["task"], run["method"]
        if run["diverged"] or run["valid_loss"] is None:
            continue
        if key not in best or run["valid_loss"] < best[key]["valid_loss"]:
            best[key] = run
    for run in best.values():
        run["chosen"] = True


def note_test(
    plan: Plan, part: Part, run: dict[str, Any], model: Any, tokenizer: Any, key: str
) -> None:
    """Scores what a model, edited as it is now, answers to the test texts of a training."""
    task = run["task"]
    examples = plan.examples(task, "test")
    prompts = [prompt(example.user) for example in examples]
    outputs = models.generate(model, tokenizer, prompts, plan.answer_tokens(task))
    run["scores"], run["n"] = TASKS[task].score(examples, outputs), len(examples)
    part.keep_outputs(task, key, outputs)
    part.save()
    print(task, run["method"], run["rate"], run["scores"], flush=True)
