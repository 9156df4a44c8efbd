"""What all parts of a run share: the plan, and the file in which a part keeps what it has."""

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from examples import END, PROMPT, Example, prompt, read_examples
from restyle import restyled
from tasks import TASKS

from redmux_adapters.train import Example as TokenExample
from redmux_adapters.train import TrainingOptions
from redmux_adapters.train.prompts import PromptWriter

SEED = 0
PLAIN_NAME = "plain.json"  # the base model's answers to the style tasks' questions
WARMUP = 0.06
_MAX_LENGTH = 256  # tokens of a training example
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
    num_train: int
    num_valid: int
    num_test: int
    max_new_tokens: int  # bound on all answers
    max_pass_tokens: int
    red_s: float  # what the training of the RED adapters may take
    deadline: float  # time.time() at which everything has to be written

    def remaining_s(self, reserve_s: float = 0.0) -> float:
        """Returns the time that is left before the deadline less a reserve."""
        return self.deadline - reserve_s - time.time()

    def answer_tokens(self, task: str) -> int:
        """Returns how many tokens an answer may have."""
        return min(TASKS[task].max_new_tokens, self.max_new_tokens)

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
        limits = {"train": self.num_train, "valid": self.num_valid, "test": self.num_test}
        return examples[: limits[split]]

    def token_examples(self, tokenizer: Any, task: str, split: str) -> list[TokenExample]:
        """Returns a split for training, without what is too long.

        They are what `PromptWriter` makes, tokenized all at once.
        """
        examples = self.examples(task, split)
        prompts = tokenizer([prompt(e.user) for e in examples], add_special_tokens=False)
        answers = tokenizer([e.target + END for e in examples], add_special_tokens=False)
        pairs = zip(prompts["input_ids"], answers["input_ids"], strict=True)
        found = [TokenExample(tuple(inputs), tuple(targets)) for inputs, targets in pairs]
        writer = PromptWriter(tokenizer, PROMPT, [tokenizer.convert_tokens_to_ids(END)])
        first = TokenExample(*writer.completion(examples[0].user, examples[0].target))
        assert found[0] == first, f"{task}: {found[0]} is not {first}"
        return [e for e in found if e.length <= _MAX_LENGTH]

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


def _write(path: Path, value: Any) -> None:
    replace_file(path, json.dumps(value, ensure_ascii=False).encode())


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file that is read at any time: its readers find the old content or the new."""
    partial = path.with_name(f".{path.name}")
    partial.write_bytes(content)
    os.replace(partial, path)
