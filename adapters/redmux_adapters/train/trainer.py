"""Trainer: one forward and backward pass over the frozen base trains all adapters."""

import resource
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import torch

from redmux.errors import FailedPreconditionError, InvalidArgumentError

from ..format.adapter import Adapter
from ..format.window import ALL
from .bank import VectorBank
from .base import TrainingBase
from .classifier import ClassifierObjective, TrainedHead
from .events import Event, Finished
from .fit import check_task
from .learner import Learner, Task
from .objectives import GenerationObjective, Row

_FORWARD_SHARE = 0.35  # of a training pass, what an evaluation takes


@dataclass(frozen=True)
class Estimate:
    """What a run will take, from passes that were timed on this machine."""

    num_tokens: int  # that all steps compute, evaluations aside
    tokens_per_s: float
    duration_s: float
    memory_bytes: int  # the process at its largest so far, which had a full pass


class Trainer:
    """Trains the adapters of all tasks in shared passes over one frozen base.

    In a step every task that has not ended contributes its own next batch. The examples of all are
    sorted by length and cut into passes of at most `max_pass_tokens` positions; gradients add up
    over the passes, and each task then takes an optimizer step of its own. So a task's result is
    the one it would have alone, but for the rounding that other batch shapes bring, and batches
    larger than memory are accumulated.

    Nothing is printed: `step` returns what happened. Belongs to one thread; the base must not be
    used by anybody else before `close`. Raises InvalidArgumentError for tasks that do not fit.
    """

    def __init__(
        self,
        base: TrainingBase,
        tasks: Sequence[Task],
        *,
        max_pass_tokens: int = 2048,
        autocast: bool = False,
    ) -> None:
        _check_names(tasks)
        self.base = base
        self._max_pass_tokens = max_pass_tokens
        sites = [check_task(base, task, max_pass_tokens) for task in tasks]
        union = {site: dim for chosen in sites for site, dim in chosen.items()}
        self._bank = VectorBank(base.model, union, len(tasks))
        self._heads: list[TrainedHead] = []
        self._objective: GenerationObjective | ClassifierObjective
        if base.kind == "classifier":
            self._heads = [TrainedHead(base, t.head_kind, t.labels, t.options.seed) for t in tasks]
            self._objective = ClassifierObjective(base, self._bank, self._heads, autocast)
        else:
            self._objective = GenerationObjective(base, self._bank, autocast)
        heads: Sequence[TrainedHead | None] = self._heads or [None] * len(tasks)
        self.learners = [
            Learner(task, row, self._bank, chosen, head)
            for row, (task, chosen, head) in enumerate(zip(tasks, sites, heads, strict=True))
        ]

    def close(self) -> None:
        """Takes the edits off the base model."""
        self._bank.close()

    @property
    def active(self) -> list[Learner]:
        """The learners whose training has not ended; none is left when the run is over."""
        return [learner for learner in self.learners if learner.ending is None]

    def step(self) -> list[Event]:
        """Takes one optimizer step of every active task and evaluates those that are due.

        A task with held-out data is evaluated before its first step, too: what no edit gives.
        """
        events = self._evaluate([item for item in self.active if item.wants_baseline])
        batches = {learner: learner.next_rows() for learner in self.active}
        self._run((row for rows in batches.values() for row in rows), train=True)
        for learner, rows in batches.items():
            events += learner.update(rows)
        events += self._evaluate([item for item in self.active if item.wants_evaluation])
        for learner in self.active:
            if learner.step >= learner.task.num_steps:
                events.append(learner.end("completed"))
        return events

    def cancel(self, name: str) -> Finished:
        """Ends one task; its adapter is what it has learned so far."""
        return self._learner(name).end("cancelled")

    def adapter(self, name: str) -> Adapter:
        """Returns the adapter of a task: its best vectors on held-out data, or its last.

        Raises FailedPreconditionError if its training diverged.
        """
        learner = self._learner(name)
        if learner.ending == "diverged":
            raise FailedPreconditionError(f"the training of {name!r} diverged")
        task, result = learner.task, learner.result()
        edits = self._bank.edits(result["values"], learner.sites)
        head = None if learner.head is None else learner.head.head(result)
        metadata = self._metadata(learner)
        return Adapter(
            self.base.fingerprint, edits, task.prompt_format, metadata, head,
            task.options.apply or ALL,
        )  # fmt: skip

    def estimate(self) -> Estimate:
        """Computes two passes that change nothing and returns what the whole run will take."""
        rows = [
            Row(learner.row, max(learner.task.train, key=lambda e: e.length), weight=1.0)
            for learner in self.active
        ]
        rows = rows * max(1, self._max_pass_tokens // sum(row.example.length for row in rows))
        (largest, *_) = sorted(self._passes(rows), key=len, reverse=True)
        self._objective.run(largest[:1], train=True)  # libraries set themselves up on first use
        start = time.perf_counter()
        self._objective.run(largest, train=True)
        seconds = time.perf_counter() - start
        for learner in self.learners:
            learner.clear_gradients()
        rate = sum(row.example.length for row in largest) / seconds
        num_tokens = sum(_num_tokens(learner) for learner in self.active)
        evaluated = sum(_num_evaluated(learner) for learner in self.active)
        duration = (num_tokens + _FORWARD_SHARE * evaluated) / rate
        return Estimate(num_tokens, rate, duration, _peak_bytes(self._bank.values.device))

    def state(self) -> dict[str, Any]:
        """Returns the state between two steps, as tensors and plain values."""
        return {
            "base": self.base.fingerprint,
            "max_pass_tokens": self._max_pass_tokens,
            "learners": {learner.task.name: learner.state() for learner in self.learners},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes back to a state; the steps that follow are those that followed it, bit by bit.

        The same machine and number of threads have to compute. Raises FailedPreconditionError,
        naming what differs, if the state is of other tasks, data or options.
        """
        ours = {"base": self.base.fingerprint, "max_pass_tokens": self._max_pass_tokens}
        differing = [name for name, value in ours.items() if state[name] != value]
        kept = state["learners"]
        if list(kept) != [learner.task.name for learner in self.learners]:
            differing.append("tasks")
        else:
            for learner in self.learners:
                mine, theirs = learner.task.identity(), kept[learner.task.name]["identity"]
                differing += [f"{learner.task.name}.{n}" for n in mine if mine[n] != theirs.get(n)]
        if differing:
            raise FailedPreconditionError(
                f"the checkpoint was made with other settings ({', '.join(differing)} differ); "
                "run with those, or into another folder"
            )
        for learner in self.learners:
            learner.restore(kept[learner.task.name])

    def _evaluate(self, due: Sequence[Learner]) -> list[Event]:
        held_out = {learner: learner.evaluation_rows() for learner in due}
        self._run((row for rows in held_out.values() for row in rows), train=False)
        return [event for learner in due for event in learner.judge(held_out[learner])]

    def _run(self, rows: Iterable[Row], train: bool) -> None:
        for part in self._passes(rows):
            self._objective.run(part, train)

    def _passes(self, rows: Iterable[Row]) -> list[list[Row]]:
        """Cuts rows, sorted by length, where they would be more positions than fit into a pass."""
        passes: list[list[Row]] = []
        width = room = 0  # of the longest row in the last pass, which is its first; what is left
        for row in sorted(rows, key=lambda row: row.example.length, reverse=True):
            length = row.example.length
            taken = width if self._objective.pads and passes else length
            if not passes or taken > room:
                passes.append([])
                width, taken, room = length, length, self._max_pass_tokens
            passes[-1].append(row)
            room -= taken
        return passes

    def _learner(self, name: str) -> Learner:
        for learner in self.learners:
            if learner.task.name == name:
                return learner
        raise InvalidArgumentError(f"no task {name!r} is trained here")

    def _metadata(self, learner: Learner) -> Any:
        task = learner.task
        best, evaluation = learner.best, ""
        if best is not None:
            evaluation = f"{len(task.valid)} held-out examples: loss {best.loss:.4f}"
            if best.accuracy is not None:
                evaluation += f", accuracy {100 * best.accuracy:.1f} %"
            if best.correlation is not None:
                evaluation += f", {task.options.metric} {best.correlation:.3f}"
            evaluation += f", at step {best.step}; the best of the evaluations"
        training = (
            f"{learner.step} steps, {learner.num_tokens} tokens, {len(task.train)} examples, "
            f"{task.options.describe()}"
        )
        if task.start is not None:
            training += f", started from {task.start.digest}"
        return replace(
            task.metadata,
            base_model_name_or_path=task.metadata.base_model_name_or_path or self.base.name,
            created_by=task.metadata.created_by or "redmux train",
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            training=training,
            evaluation=evaluation,
        )


def _check_names(tasks: Sequence[Task]) -> None:
    if not tasks:
        raise InvalidArgumentError("no tasks; give at least one")
    names = [task.name for task in tasks]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise InvalidArgumentError(f"task names occur twice: {', '.join(sorted(twice))}")


def _num_tokens(learner: Learner) -> int:
    task = learner.task
    mean = sum(example.length for example in task.train) / len(task.train)
    return round((task.num_steps - learner.step) * task.options.batch_size * mean)


def _num_evaluated(learner: Learner) -> int:
    task = learner.task
    times = -(-(task.num_steps - learner.step) // task.options.eval_every) + learner.wants_baseline
    return times * sum(example.length for example in task.valid)


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
