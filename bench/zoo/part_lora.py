"""The parts that train LoRA with PEFT, on the data, batches and steps that RED has."""

import model as models
import torch
from plan import SEED, Part, Plan
from trainings import Variant, load_base, note_test, train, trainer_tasks

from redmux_bench.lora import LoraBank, LoraTrainer

TARGETS = ("q_proj", "v_proj")  # PEFT's default for Llama


def lora(plan: Plan, part: Part, rank: int, rate: float) -> None:
    """Trains a LoRA of this rank for every task, and scores it on the test texts."""
    best = _trained(plan, part, rank, rate)
    model, tokenizer = models.load(plan.base, plan.device)
    bank = LoraBank(model, [SEED] * len(plan.tasks), rank, TARGETS)
    bank.values.copy_(best)
    for row, run in enumerate(part.runs):
        bank.activate(row)
        note_test(plan, part, run, bank.peft, tokenizer, f"{run['method']}|{run['rate']:g}")


def _trained(plan: Plan, part: Part, rank: int, rate: float) -> torch.Tensor:
    """Returns the best weights of each task's adapter as rows."""
    base = load_base(plan)
    variants = [Variant(task, f"LoRA r={rank}", rate) for task in plan.tasks]
    tasks = trainer_tasks(plan, base, variants, plan.chosen_steps(plan.steps))
    trainer = LoraTrainer(base, tasks, rank, TARGETS, max_pass_tokens=plan.max_pass_tokens)
    train(plan, part, trainer, variants, lambda learner: trainer.bank.values.shape[1])
    return torch.stack([learner.result()["values"] for learner in trainer.learners])
