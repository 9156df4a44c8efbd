"""Training jobs, as the client takes and returns them, without any protobuf in them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, TypeAlias, TypedDict

JobState: TypeAlias = Literal["queued", "running", "finished", "cancelled", "failed"]
TaskState: TypeAlias = Literal[
    "queued", "running", "completed", "stopped_early", "diverged", "cancelled", "failed"
]


class TrainingOptions(TypedDict, total=False):
    """How an adapter is trained; what is left out has the default of `redmux train`.

    docs/training.md explains each of them.
    """

    learning_rate: float
    head_learning_rate: float
    steps: int
    epochs: float
    batch_size: int
    schedule: Literal["linear", "cosine", "constant"]
    warmup: float
    warmup_steps: int
    weight_decay: float
    clip_norm: float
    label_smoothing: float
    sites: str
    layers: str
    apply: str
    """Which tokens are edited: all, prompt, generation or after:TEXT."""
    train: Literal["both", "scale", "bias", "ln", "head"]
    eval_every: int
    patience: int
    metric: Literal["loss", "accuracy", "matthews", "pearson"]
    head: str
    seed: int
    valid_share: float
    """Share of the records that is held out where a task has no `valid`."""
    prompt_format: str | Mapping[str, Sequence[str]]
    """auto, template, chatml, raw, or turns such as {"user": [prefix, suffix], ...}."""
    max_length: int
    labels: Sequence[str]
    description: str
    license: str


@dataclass(frozen=True, slots=True)
class TrainingTask:
    """One adapter to train, and what from.

    A record is a mapping with the fields of a line of training data: prompt and completion, or
    messages for decoders; text and label, or text and score, for encoders. Without `valid`, a share
    of the records is held out.
    """

    adapter: str
    records: Sequence[Mapping[str, Any]]
    valid: Sequence[Mapping[str, Any]] = ()
    options: TrainingOptions = field(default_factory=TrainingOptions)


@dataclass(frozen=True, slots=True)
class TrainingStep:
    """One optimizer step of one adapter; `loss` is the mean over its batch, before the step."""

    adapter: str
    step: int
    num_steps: int
    loss: float
    learning_rate: float
    grad_norm: float
    num_tokens: int


@dataclass(frozen=True, slots=True)
class TrainingEvaluation:
    """One evaluation on held-out records; step 0 is the base model, `accuracy` None for scores.

    `correlation` is the task's metric where that is "matthews" or "pearson".
    """

    adapter: str
    step: int
    loss: float
    accuracy: float | None
    is_best: bool
    correlation: float | None = None


@dataclass(frozen=True, slots=True)
class JobTask:
    """How far one adapter of a job is.

    `loss` is that of the last step, `best` the best evaluation so far, `digest` that of the
    published adapter; each is None before there is one. `detail` says why it is no success.
    """

    adapter: str
    state: TaskState
    detail: str
    step: int
    num_steps: int
    loss: float | None
    best: TrainingEvaluation | None
    num_tokens: int
    num_examples: int
    num_held_out: int
    digest: str | None


@dataclass(frozen=True, slots=True)
class Job:
    """A training job as it stood. `num_ahead` jobs are probably trained before it."""

    id: str
    state: JobState
    detail: str
    tasks: tuple[JobTask, ...]
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    num_ahead: int

    @property
    def has_ended(self) -> bool:
        """Whether nothing about it will change any more."""
        return self.state not in ("queued", "running")

    @property
    def is_success(self) -> bool:
        """Whether every task has ended with a published adapter."""
        return all(task.state in ("completed", "stopped_early") for task in self.tasks)


JobEvent: TypeAlias = Job | TrainingStep | TrainingEvaluation
