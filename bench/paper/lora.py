"""LoRA by PEFT on a run of glue.py: the same examples in the same batches, head, schedule, choice.

python bench/paper/lora.py --work glue --data DATA --out lora.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from glue_data import TASKS, load
from glue_metrics import score
from recipe import write_results
from tqdm import trange

from redmux.training_data import Faults, Record
from redmux_adapters.train import Example, Task, TrainingBase
from redmux_adapters.train.examples import ExampleReader
from redmux_adapters.train.job import read_job
from redmux_adapters.train.learner import Learner
from redmux_adapters.train.padded import attention_mask, padded
from redmux_adapters.train.preparation import prepare
from redmux_adapters.train.prompts import PromptWriter
from redmux_bench.lora import LoraTrainer


def main() -> int:
    """Trains LoRA on each task that RED was trained on."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", required=True, help="folder of a run of glue.py with red")
    parser.add_argument("--data", required=True, help="as for glue.py")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", default="lora.json")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    job = read_job(Path(options.work) / "job.json", {})
    red = tuple(task for task in job.tasks if task.name.endswith("-red"))
    base, tasks, _ = prepare(replace(job, tasks=red))
    tasks = [
        replace(task, options=replace(task.options, learning_rate=options.learning_rate))
        for task in tasks
    ]
    trainer = LoraTrainer(
        base, tasks, options.rank, ("query", "value"), max_pass_tokens=job.max_pass_tokens,
        has_baseline=False,
    )  # fmt: skip
    for _ in trange(max(task.num_steps for task in tasks), unit="step", disable=None):
        trainer.step()
    rows = []
    for learner in trainer.learners:
        name, best = learner.task.name.removesuffix("-red"), learner.best
        assert best is not None
        assert best.accuracy is not None
        records = load(name, options.data, learner.task.options.seed).test
        test = _examples(base, learner.task, records)
        answers = _answers(trainer, learner, test)
        right = [int(example.label) for example in test]
        rows.append({
            "task": name, "method": f"lora-r{options.rank}",
            "values": trainer.bank.values.shape[1], "num_test": len(test),
            "valid_accuracy": 100 * best.accuracy, "step": best.step,
            "test": {metric: score(metric, answers, right) for metric in TASKS[name].metrics},
        })  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    write_results(options.out, rows, learning_rate=options.learning_rate)
    return 0


def _examples(base: TrainingBase, task: Task, records: Sequence[Any]) -> list[Example]:
    writer = PromptWriter(base.tokenizer, "raw", base.eos_ids)
    reader = ExampleReader(base.kind, ("text", "label"), writer, 512, task.labels)
    faults = Faults()
    examples = reader.read((Record(f"test:{i}", r) for i, r in enumerate(records, 1)), faults)
    faults.raise_any()
    return examples


@torch.no_grad()
def _answers(trainer: LoraTrainer, learner: Learner, examples: Sequence[Example]) -> list[int]:
    """Returns the most likely label of each example, by the best of the evaluated weights."""
    assert learner.head is not None
    best, bank, labels = learner.result(), trainer.bank, []
    bank.values[learner.row] = best["values"]
    for name, parameter in learner.head.parameters.items():
        parameter.copy_(best[name])
    for start in range(0, len(examples), 32):
        part = examples[start : start + 32]
        lengths = [len(example.inputs) for example in part]
        inputs = {
            "input_ids": padded([example.inputs for example in part], 0),
            "attention_mask": (mask := attention_mask(lengths, max(lengths))),
            "token_type_ids": padded([e.types or (0,) * len(e.inputs) for e in part], 0),
        }
        with bank.editing(torch.full((len(part),), learner.row)):
            out = bank(**inputs)
        labels += learner.head.logits(out.last_hidden_state, mask).argmax(-1).tolist()
    return labels


if __name__ == "__main__":
    sys.exit(main())
