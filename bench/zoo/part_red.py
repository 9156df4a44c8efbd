"""The parts that train edits: RED, RED++ and the ablations, each part in shared passes."""

import json
from collections.abc import Sequence
from pathlib import Path

import model as models
from plan import Part, Plan
from trainings import Variant, load_base, note_test, train, trainer_tasks

from redmux_adapters import Adapter
from redmux_adapters.train import Trainer
from redmux_adapters.train.learner import Learner
from redmux_bench.plain_model import edited

RATES = (1e-2, 2e-2)
DEFAULT_RATE = 2e-2  # where RED's own choice is not known
ABLATED = ("restaurant", "assistant-json", "banking")
ABLATIONS: dict[str, dict[str, str]] = {
    "RED, scale only": {"train": "scale"},
    "RED, bias only": {"train": "bias"},
    "RED, attn": {"sites": "attn"},
    "RED, ffn_attn": {"sites": "ffn_attn"},
}


def red(plan: Plan, part: Part) -> None:
    """Trains RED adapters at several rates; settles how many steps everything takes."""
    variants = [Variant(task, "RED", rate) for task in plan.tasks for rate in RATES]
    _test(plan, part, _trained(plan, part, variants, settles_steps=True))


def more(plan: Plan, part: Part, factor: float) -> None:
    """Trains RED++ adapters at `factor` of the rates that were best for RED."""
    rates = red_rates(plan)
    variants = [
        Variant(task, "RED++", factor * rates.get(task, DEFAULT_RATE), {"sites": "more"})
        for task in plan.tasks
    ]
    _test(plan, part, _trained(plan, part, variants))


def ablations(plan: Plan, part: Part) -> None:
    """Trains parts of RED, and RED elsewhere, on some tasks at the rates best for RED."""
    rates = red_rates(plan)
    variants = [
        Variant(task, method, rates.get(task, DEFAULT_RATE), changes)
        for task in ABLATED
        if task in plan.tasks
        for method, changes in ABLATIONS.items()
    ]
    _test(plan, part, _trained(plan, part, variants))


def red_rates(plan: Plan) -> dict[str, float]:
    """Returns by task the rate of the RED adapter with the lowest held-out loss."""
    path = Path(plan.work) / "part-red.json"
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []
    return {run["task"]: run["rate"] for run in runs if run["chosen"]}


def _trained(
    plan: Plan, part: Part, variants: Sequence[Variant], settles_steps: bool = False
) -> dict[str, Adapter]:
    """Returns the adapters of the best rates, which are saved, too, by the variants' names."""
    base = load_base(plan)

    def new_trainer(steps: int) -> Trainer:
        tasks = trainer_tasks(plan, base, variants, steps)
        return Trainer(base, tasks, max_pass_tokens=plan.max_pass_tokens)

    steps = plan.chosen_steps(plan.steps)
    trainer = new_trainer(steps)
    if settles_steps:
        estimate = trainer.estimate()
        part.notes["estimate_s"] = estimate.duration_s
        part.notes["tokens_per_s"] = estimate.tokens_per_s
        part.notes["memory_bytes"] = estimate.memory_bytes
        if estimate.duration_s > plan.red_s:
            steps = max(8, int(steps * plan.red_s / estimate.duration_s))
            trainer.close()
            trainer = new_trainer(steps)
        print(f"{steps} steps; {estimate}", flush=True)
        plan.choose_steps(steps)
    train(plan, part, trainer, variants, _num_parameters)
    adapters = {
        variant.name: trainer.adapter(variant.name)
        for variant, run in zip(variants, part.runs, strict=True)
        if run["chosen"]
    }
    for name, adapter in adapters.items():
        adapter.save(Path(plan.work) / "adapters" / name.replace("|", "@").replace(" ", "_"))
    trainer.close()
    (Path(plan.work) / f"{part.path.stem}.trained").touch()
    return adapters


def _num_parameters(learner: Learner) -> int:
    per_site = 2 if learner.task.options.train == "both" else 1
    return per_site * sum(learner.sites.values())


def _test(plan: Plan, part: Part, adapters: dict[str, Adapter]) -> None:
    """Scores the best adapter of each task and method on the task's test texts."""
    model, tokenizer = models.load(plan.base, plan.device)
    for run in part.runs:
        if run["chosen"]:
            adapter = adapters[Variant(run["task"], run["method"], run["rate"]).name]
            with edited(model, adapter.edits):
                note_test(plan, part, run, model, tokenizer, run["method"])
