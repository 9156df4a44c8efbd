"""LoRA by PEFT on a run of glue.py: the same examples in the same batches, head, schedule, choice.

python bench/paper/lora.py --work glue --data DATA --out lora.json
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from glue_data import TASKS, load
from glue_metrics import score
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from redmux_adapters.train import Example, Task, TrainingBase
from redmux_adapters.train.classifier import TrainedHead
from redmux_adapters.train.examples import ExampleReader
from redmux_adapters.train.job import read_job
from redmux_adapters.train.objectives import attention_mask, padded
from redmux_adapters.train.options import rate_factor
from redmux_adapters.train.preparation import prepare
from redmux_adapters.train.prompts import PromptWriter
from redmux_adapters.train.records import Faults, Record
from redmux_adapters.train.stream import BatchStream
from redmux_bench import report


class Classifier:
    """An encoder with LoRA on its queries and values, and the head that RED has there, too."""

    def __init__(self, base: TrainingBase, task: Task, rank: int) -> None:
        lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["query", "value"])
        torch.manual_seed(task.options.seed)
        self._peft = get_peft_model(base.model, lora)
        self._head = TrainedHead(base, task.options.head, task.labels, task.options.seed)
        self.lora = [p for p in self._peft.parameters() if p.requires_grad]
        self.head = list(self._head.parameters.values())

    def logits(self, examples: Sequence[Example]) -> Tensor:
        """Returns [examples, labels]."""
        lengths = [len(example.inputs) for example in examples]
        width = max(lengths)
        mask = attention_mask(lengths, width)
        types = padded([e.types or (0,) * len(e.inputs) for e in examples], 0)
        ids = padded([e.inputs for e in examples], 0)
        out = self._peft(input_ids=ids, attention_mask=mask, token_type_ids=types)
        return self._head.logits(out.last_hidden_state, mask)

    @torch.no_grad()
    def answers(self, examples: Sequence[Example]) -> list[int]:
        """Returns the most likely label of each example."""
        order = sorted(range(len(examples)), key=lambda i: examples[i].length)
        labels = [0] * len(examples)
        for start in range(0, len(order), 32):
            part = order[start : start + 32]
            for i, label in zip(
                part, self.logits([examples[i] for i in part]).argmax(-1).tolist(), strict=True
            ):
                labels[i] = label
        return labels

    def close(self) -> None:
        """Takes LoRA off the base again."""
        self._peft.unload()


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
    rows = []
    for task in tasks:
        name = task.name.removesuffix("-red")
        records = load(name, options.data, task.options.seed).test
        test = _examples(base, task, records)
        model = Classifier(base, task, options.rank)
        choice = _train(model, task, options.learning_rate)
        answers = model.answers(test)
        right = [int(example.label) for example in test]
        rows.append({
            "task": name, "method": f"lora-r{options.rank}",
            "values": sum(p.numel() for p in model.lora), "num_test": len(test), **choice,
            "test": {metric: score(metric, answers, right) for metric in TASKS[name].metrics},
        })  # fmt: skip
        model.close()
        print(json.dumps(rows[-1]), flush=True)
    result = {
        "command_line": " ".join(["lora.py", *sys.argv[1:]]), "machine": report.machine(),
        "learning_rate": options.learning_rate, "rows": rows,
    }  # fmt: skip
    Path(options.out).write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _examples(base: TrainingBase, task: Task, records: Sequence[Any]) -> list[Example]:
    writer = PromptWriter(base.tokenizer, "raw", base.eos_ids)
    reader = ExampleReader(base.kind, ("text", "label"), writer, 512, task.labels)
    faults = Faults()
    examples = reader.read((Record(f"test:{i}", r) for i, r in enumerate(records, 1)), faults)
    faults.raise_any()
    return examples


def _train(model: Classifier, task: Task, learning_rate: float) -> dict[str, float]:
    """Trains as the options say; the weights are then the best of the evaluations."""
    options, parameters = task.options, [*model.lora, *model.head]
    rates = (learning_rate, options.head_learning_rate)
    optimizer = torch.optim.AdamW(
        [{"params": model.lora}, {"params": model.head}], weight_decay=options.weight_decay
    )
    best: dict[str, float] = {"valid_accuracy": -1.0, "step": 0}
    kept: list[Tensor] = []
    for step, batch in enumerate(_batches(task), 1):
        loss = nn.functional.cross_entropy(
            model.logits(batch), torch.tensor([int(example.label) for example in batch])
        )
        for parameter in parameters:
            parameter.grad = None
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, options.clip_norm or math.inf)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * rate_factor(options, step - 1, task.num_steps)
        optimizer.step()
        if step % options.eval_every == 0 or step == task.num_steps:
            answers = model.answers(task.valid)
            right = sum(a == e.label for a, e in zip(answers, task.valid, strict=True))
            if 100 * right / len(answers) > best["valid_accuracy"]:
                best = {"valid_accuracy": 100 * right / len(answers), "step": step}
                kept = [copy.deepcopy(parameter.data) for parameter in parameters]
    for parameter, values in zip(parameters, kept, strict=True):
        parameter.data.copy_(values)
    return best


def _batches(task: Task) -> Iterator[list[Example]]:
    stream = BatchStream([e.length for e in task.train], task.options.batch_size, task.options.seed)
    for _ in range(task.num_steps):
        yield [task.train[i] for i in stream.next()]


if __name__ == "__main__":
    sys.exit(main())
