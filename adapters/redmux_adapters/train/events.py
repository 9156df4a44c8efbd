"""What a trainer tells after every step."""

from dataclasses import dataclass
from typing import Literal

Ending = Literal["completed", "stopped early", "diverged", "cancelled"]


@dataclass(frozen=True)
class Stepped:
    """One optimizer step of one adapter."""

    task: str
    step: int  # from 1 on
    num_steps: int
    loss: float  # mean over the batch's tokens or labels, before the step
    learning_rate: float
    grad_norm: float  # before clipping
    num_tokens: int  # of the batch, prompts included, padding not


@dataclass(frozen=True)
class Evaluated:
    """One pass over the held-out examples of one adapter."""

    task: str
    step: int  # steps taken before
    loss: float
    accuracy: float | None  # share of right tokens or labels; None for scores
    is_best: bool  # so far, by the task's metric
    correlation: float | None = None  # the task's metric, where that is matthews or pearson


@dataclass(frozen=True)
class Finished:
    """The end of one adapter's training; `detail` says why where it is not complete."""

    task: str
    step: int
    ending: Ending
    detail: str = ""


Event = Stepped | Evaluated | Finished
