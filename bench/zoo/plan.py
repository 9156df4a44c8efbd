"""What all parts of a run share: the plan, and the file in which a part keeps what it has."""

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from examples import PROMPT, Example, read_examples
from restyle import restyled
from tasks import TASKS

from redmux_adapters.train import Example as TokenExample
from redmux_adapters.train import TrainingOptions
from redmux_adapters.train.prompts import PromptWriter

SEED = 0
PLAIN_NAME = "plain.json"  # the base model's answers to the style tasks' questions
WARMUP = 0.06
EVALUATIONS = 8  # of the held-out loss, in the course of a training


@dataclass(frozen=True)
class Plan:
    """The settings of a run, the same in all its processes."""

    base: str  # folder of the fp32 model
    data: str  # folder that prepare.py filled
    work: str  # folder of this run's own files
    device: str
    dtype: str  # of the base in training; answers are always generated in fp32
    tasks: tuple[str, ...]
    steps: int  # of most tasks; less where `red` finds that the time is not enough
    batch_size: int
    num_valid: int
    num_test: int
    max_pass_tokens: int
    red_s: float  # what the training of the RED adapters may take
    deadline: float  # time.time() at which everything has to be written

    def remaining_s(self, reserve_s: float = 0.0) -> float:
        """Returns the time that is left before the deadline less a reserve."""
        return self.deadline - reserve_s - time.time()

    def save(self) -> None:
        """Writes the plan where the parts look for it."""
        _write(Path(self.work) / "plan.json", asdict(self))

    @classmethod
    def read(cls, work: str) -> "Plan":
        """Reads what `save` wrote."""
        values = json.loads((Path(work) / "plan.json").read_text(encoding="utf-8"))
        return cls(**values | {"tasks": tuple(values["tasks"])})

    def examples(self, task: str, split: str) -> list[Example]:
        """Returns a split as this run uses it."""
        examples = read_examples(Path(self.data) / f"{task}.{split}.jsonl")
        style = TASKS[task].style
        if style is not None:
            plain = json.loads((Path(self.work) / PLAIN_NAME).read_text(encoding="utf-8"))
            examples = restyled(style, examples, split, plain)
        limits = {"valid": self.num_valid, "test": self.num_test}
        return examples[: limits.get(split)]

    def token_examples(self, writer: PromptWriter, task: str, split: str) -> list[TokenExample]:
        """Returns a split for training, without what is too long for a pass."""
        examples = [
            TokenExample(*writer.completion(e.user, e.target)) for e in self.examples(task, split)
        ]
        return [e for e in examples if e.length <= min(256, self.max_pass_tokens)]

    def options(self, task: str, steps: int, rate: float, **changes: Any) -> TrainingOptions:
        """Returns the options of a training, the same for all methods but for the rate."""
        own_steps = max(1, round(steps * TASKS[task].steps))
        return TrainingOptions(
            learning_rate=rate, steps=own_steps, batch_size=self.batch_size, seed=SEED,
            warmup=WARMUP, eval_every=max(1, own_steps // EVALUATIONS), **changes,
        )  # fmt: skip

    def chosen_steps(self, default: int = 0) -> int:
        """Returns the number of steps that `red` settled on, `default` before it has."""
        path = Path(self.work) / "steps.json"
        return int(json.loads(path.read_text())) if path.exists() else default

    def choose_steps(self, steps: int) -> None:
        """Settles the number of steps for all later parts."""
        _write(Path(self.work) / "steps.json", steps)


class Part:
    """What a part of the run has found so far, replaced on disk as a whole.

    `runs` are trainings with their scores, `curves` the course of their losses, `outputs` the
    answers by task and method, `base` the unedited model's scores by task.
    """

    def __init__(self, plan: Plan, name: str) -> None:
        self.path = Path(plan.work) / f"part-{name}.json"
        self.runs: list[dict[str, Any]] = []
        self.curves: list[dict[str, Any]] = []
        self.outputs: dict[str, dict[str, list[str]]] = {}
        self.base: dict[str, dict[str, Any]] = {}
        self.notes: dict[str, Any] = {}

    def save(self) -> None:
        """Replaces the file."""
        names = ("runs", "curves", "outputs", "base", "notes")
        _write(self.path, {name: getattr(self, name) for name in names})

    def keep_outputs(self, task: str, method: str, outputs: list[str]) -> None:
        """Adds the answers of a method to a task's test texts."""
        self.outputs.setdefault(task, {})[method] = outputs


def writer_of(tokenizer: Any, eos_ids: list[int]) -> PromptWriter:
    """Returns what turns texts into token ids as a server does."""
    return PromptWriter(tokenizer, PROMPT, eos_ids)


def _write(path: Path, value: Any) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    os.replace(partial, path)
