"""JobChecker: refuses what cannot be trained before it is queued, without the base's weights."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property

from redmux.errors import InvalidArgumentError, ResourceExhaustedError
from redmux_adapters.train import Task, TrainingBase
from redmux_adapters.train.base import load_without_weights
from redmux_adapters.train.classifier import TrainedHead
from redmux_adapters.train.fit import check_task
from redmux_adapters.train.inline import InlineTask, make_inline_tasks
from redmux_adapters.train.options import default_learning_rate
from redmux_adapters.train.preparation import training_kind
from redmux_server.training.job import JobTask

MAX_TASKS = 64
MAX_RECORDS = 100_000
MAX_PASS_TOKENS = 2048
_MOST_SHOWN_CHARS = 1500  # of a refusal, which travels in a header


@dataclass(frozen=True, slots=True)
class TrainingSetup:
    """The base model of the server, and what computes it."""

    model: str
    tokenizer: str  # instead of the model's own, empty for that
    device: str
    dtype: str
    num_threads: int
    fingerprint: str
    max_tokens: int  # that one job may compute


class JobChecker:
    """Reads and tokenizes the records of jobs as the training process will.

    Belongs to one thread. The first check loads a tokenizer of its own.
    """

    def __init__(self, setup: TrainingSetup) -> None:
        self._setup = setup

    def check(self, inline: Sequence[InlineTask]) -> tuple[list[JobTask], bytes]:
        """Returns the tasks of a job, and what the training process needs to know of them.

        Raises InvalidArgumentError, naming task, record and field, for what cannot be trained and
        ResourceExhaustedError for more than one job may take.
        """
        _check_size(inline)
        inline = [_whole(item) for item in inline]
        try:
            tasks = make_inline_tasks(self._base, inline)
            for index, task in enumerate(tasks):
                self._check_fit(index, task)
        except InvalidArgumentError as err:
            raise InvalidArgumentError(_shortened(err.message)) from None
        self._check_cost(tasks)
        plans = [JobTask(t.name, t.num_steps, len(t.train), len(t.valid)) for t in tasks]
        return plans, json.dumps([asdict(item) for item in inline]).encode()

    def default_learning_rate(self) -> float:
        """Returns the rate that tasks without one of their own are trained at."""
        return default_learning_rate(self._base.num_parameters, self._base.kind == "classifier")

    @cached_property
    def _base(self) -> TrainingBase:
        setup = self._setup
        return load_without_weights(
            setup.model, training_kind(setup.model), setup.fingerprint, setup.tokenizer
        )

    def _check_fit(self, index: int, task: Task) -> None:
        longest = max(example.length for example in (*task.train, *task.valid))
        if longest > MAX_PASS_TOKENS:
            raise InvalidArgumentError(
                f"tasks[{index}]: an example has {longest} tokens; the limit is {MAX_PASS_TOKENS}"
            )
        try:
            check_task(self._base, task, MAX_PASS_TOKENS)
            if self._base.kind == "classifier":
                TrainedHead(self._base, task.head_kind, task.labels, task.options.seed)
        except InvalidArgumentError as err:
            raise InvalidArgumentError(f"tasks[{index}]: {err.message}") from None

    def _check_cost(self, tasks: Sequence[Task]) -> None:
        num_tokens = sum(map(_num_tokens, tasks))
        if num_tokens > self._setup.max_tokens:
            raise ResourceExhaustedError(
                f"the job would compute about {num_tokens} tokens, the limit is "
                f"{self._setup.max_tokens}; take fewer steps, epochs or evaluations"
            )


def check_num_tasks(num: int) -> None:
    """Raises InvalidArgumentError for a job of too many tasks, or none."""
    if not 0 < num <= MAX_TASKS:
        raise InvalidArgumentError(f"tasks: there are {num}, must be 1 to {MAX_TASKS}")


def _whole(item: InlineTask) -> InlineTask:
    """Returns the task with records that are lists, since they may be read when asked for."""
    return replace(item, records=list(item.records), valid=list(item.valid))


def _check_size(inline: Sequence[InlineTask]) -> None:
    check_num_tasks(len(inline))
    num_records = sum(len(item.records) + len(item.valid) for item in inline)
    if num_records > MAX_RECORDS:
        raise ResourceExhaustedError(
            f"the job has {num_records} records, the limit is {MAX_RECORDS}"
        )


def _num_tokens(task: Task) -> int:
    """Returns about how many tokens a task computes, in steps and evaluations."""
    in_epoch = sum(example.length for example in task.train)
    trained = task.num_steps * task.options.batch_size * in_epoch // len(task.train)
    num_evaluations = 1 + -(-task.num_steps // task.options.eval_every)
    return trained + num_evaluations * sum(example.length for example in task.valid)


def _shortened(text: str) -> str:
    return text if len(text) <= _MOST_SHOWN_CHARS else text[:_MOST_SHOWN_CHARS] + " ..."
