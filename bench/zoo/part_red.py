"""The parts that train edits: RED, RED++ and the ablations, each part in shared passes."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import model as models
import torch
from examples import PROMPT, prompt
from plan import Part, Plan
from tasks import TASKS

from redmux_adapters import Adapter, AdapterMetadata, write_folder
from redmux_adapters.train import Evaluated, Stepped, Trainer, TrainingBase
from redmux_adapters.train import Task as TrainingTask
from redmux_adapters.train.bank import VectorBank

BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
RATES = (1e-2, 2e-2)
DEFAULT_RATE = 2e-2  # where RED's own choice is not known
ABLATED = ("restaurant", "assistant-json", "banking")
ABLATIONS: dict[str, dict[str, str]] = {
    "RED, scale only": {"train": "scale"},
    "RED, bias only": {"train": "bias"},
    "RED, attn": {"sites": "attn"},
    "RED, ffn_attn": {"sites": "ffn_attn"},
}
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


def red(plan: Plan, part: Part) -> None:
    """Trains RED adapters at several rates; settles how many steps everything takes."""
    variants = [Variant(task, "RED", rate) for task in plan.tasks for rate in RATES]
    _train_and_test(plan, part, variants, settles_steps=True)


def more(plan: Plan, part: Part, factor: float) -> None:
    """Trains RED++ adapters at `factor` of the rates that were best for RED."""
    rates = red_rates(plan)
    variants = [
        Variant(task, "RED++", factor * rates.get(task, DEFAULT_RATE), {"sites": "more"})
        for task in plan.tasks
    ]
    _train_and_test(plan, part, variants)


def ablations(plan: Plan, part: Part) -> None:
    """Trains parts of RED, and RED elsewhere, on some tasks at the rates best for RED."""
    rates = red_rates(plan)
    variants = [
        Variant(task, method, rates.get(task, DEFAULT_RATE), changes)
        for task in ABLATED
        if task in plan.tasks
        for method, changes in ABLATIONS.items()
    ]
    _train_and_test(plan, part, variants)


def red_rates(plan: Plan) -> dict[str, float]:
    """Returns by task the rate of the RED adapter with the lowest held-out loss."""
    path = Path(plan.work) / "part-red.json"
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []
    return {run["task"]: run["rate"] for run in runs if run["chosen"]}


def _train_and_test(
    plan: Plan, part: Part, variants: Sequence[Variant], settles_steps: bool = False
) -> None:
    model, tokenizer = models.load(plan.base, plan.device, plan.dtype)
    base = TrainingBase.of(model, tokenizer, BASE_NAME)
    steps = plan.chosen_steps(plan.steps)
    trainer = _trainer(plan, base, variants, steps)
    if settles_steps:
        estimate = trainer.estimate()
        part.notes["estimate_s"] = estimate.duration_s
        part.notes["tokens_per_s"] = estimate.tokens_per_s
        part.notes["memory_bytes"] = estimate.memory_bytes
        if estimate.duration_s > plan.red_s:
            steps = max(8, int(steps * plan.red_s / estimate.duration_s))
            trainer.close()
            trainer = _trainer(plan, base, variants, steps)
        print(f"{steps} steps; {estimate}", flush=True)
        plan.choose_steps(steps)
    seconds = _train(plan, part, trainer)
    _note_runs(part, trainer, variants, seconds)
    part.save()
    adapters = {
        variant.name: trainer.adapter(variant.name)
        for variant, run in zip(variants, part.runs, strict=True)
        if run["chosen"]
    }
    for name, adapter in adapters.items():
        folder = name.replace("|", "@").replace(" ", "_")
        write_folder(adapter, Path(plan.work) / "adapters" / folder)
    trainer.close()
    (Path(plan.work) / f"{part.path.stem}.trained").touch()
    del trainer, base, model
    if plan.device == "cuda":
        torch.cuda.empty_cache()
    model, tokenizer = models.load(plan.base, plan.device)
    _test(plan, part, model, tokenizer, adapters)


def _trainer(plan: Plan, base: TrainingBase, variants: Sequence[Variant], steps: int) -> Trainer:
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
        tasks.append(TrainingTask(variant.name, train, options, valid, PROMPT, (), about))
    return Trainer(base, tasks, max_pass_tokens=plan.max_pass_tokens)


def _train(plan: Plan, part: Part, trainer: Trainer) -> float:
    """Trains to the end, or until there is just time for the test; returns the seconds taken."""
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
    return time.perf_counter() - start


def _note_runs(part: Part, trainer: Trainer, variants: Sequence[Variant], seconds: float) -> None:
    """Adds what is known of every training; the best rate of a task and method is chosen."""
    all_tokens = sum(learner.num_tokens for learner in trainer.learners)
    for variant, learner in zip(variants, trainer.learners, strict=True):
        per_site = 2 if learner.task.options.train == "both" else 1
        part.runs.append({
            "task": variant.task, "method": variant.method, "rate": variant.rate,
            "parameters": per_site * sum(learner.sites.values()),
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


def _test(plan: Plan, part: Part, model: Any, tokenizer: Any, adapters: dict[str, Adapter]) -> None:
    """Scores the adapters of each task on its test texts, all of them in the same batches."""
    for task in plan.tasks:
        chosen = [(name, a) for name, a in adapters.items() if name.startswith(f"{task}|")]
        if not chosen:
            continue
        examples = plan.examples(task, "test")
        bank = filled_bank(model, [adapter for _, adapter in chosen])
        owners = [number for number in range(len(chosen)) for _ in examples]
        outputs = models.generate(
            model, tokenizer, [prompt(e.user) for e in examples] * len(chosen),
            plan.answer_tokens(task), models.edited_by(bank, owners),
        )  # fmt: skip
        bank.close()
        for number, (name, _) in enumerate(chosen):
            own = outputs[number * len(examples) : (number + 1) * len(examples)]
            method = name.split("|")[1]
            (run,) = (r for r in part.runs if r["chosen"] and r["task"] == task
                      and r["method"] == method)  # fmt: skip
            run["scores"], run["n"] = TASKS[task].score(examples, own), len(examples)
            part.keep_outputs(task, method, own)
            print(task, method, run["scores"], flush=True)
        part.save()


@torch.no_grad()
def filled_bank(model: Any, adapters: Sequence[Adapter]) -> VectorBank:
    """Returns a bank on the model with an adapter in each row."""
    sites = {site: dim for adapter in adapters for site, dim in adapter.sites.items()}
    bank = VectorBank(model, sites, len(adapters))
    for row, adapter in enumerate(adapters):
        start = 0
        for site, dim in bank.sites.items():
            edit = adapter.edits.get(site)
            if edit is not None:
                bank.values[row, start : start + dim] = (edit.scale - 1).to(bank.values.device)
                bank.values[row, start + dim : start + 2 * dim] = edit.bias.to(bank.values.device)
            start += 2 * dim
    return bank
