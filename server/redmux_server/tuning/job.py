"""TuningJob: one fine-tuning job as it is told, and what has happened to it. No I/O."""

import csv
import io
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from redmux_adapters.train import Evaluated, Stepped

ENDS = frozenset(("succeeded", "failed", "cancelled"))
MOST_TOLD = 200  # steps of a job, and evaluations, evenly over its course
_COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")


@dataclass(slots=True)
class Hyperparameters:
    """What may be chosen; None is automatic, and is replaced once the data is known."""

    n_epochs: int | None = None
    batch_size: int | None = None
    learning_rate_multiplier: float | None = None

    def settle(self, num_examples: int) -> None:
        """Chooses what was left open.

        Small data is gone through more often and in smaller batches, so that there are enough
        steps; the rules are those of docs/fine_tuning.md.
        """
        if self.n_epochs is None:
            self.n_epochs = min(25, max(3, 100 // num_examples))
        if self.batch_size is None:
            self.batch_size = min(16, max(1, num_examples // 16))
        if self.learning_rate_multiplier is None:
            self.learning_rate_multiplier = 1.0


@dataclass(slots=True, eq=False)
class TuningJob:
    """A job of one tenant; times are in seconds since the epoch. Belongs to the event loop."""

    tenant: str
    model: str  # as the caller named it
    training_file: str
    validation_file: str | None
    suffix: str
    hyperparameters: Hyperparameters
    seed: int
    metadata: Mapping[str, str] = field(default_factory=dict)
    id: str = field(default_factory=lambda: f"ftjob-{secrets.token_hex(12)}")
    created_at: float = field(default_factory=time.time)
    status: str = "validating_files"
    finished_at: float | None = None
    fine_tuned_model: str | None = None
    trained_tokens: int | None = None
    error: dict[str, Any] | None = None
    result_files: list[str] = field(default_factory=list)
    checkpoint: dict[str, Any] | None = None
    events: list[dict[str, Any]] = field(default_factory=list)  # the oldest first

    @property
    def has_ended(self) -> bool:
        """Whether nothing about it will change any more."""
        return self.status in ENDS

    def say(
        self, message: str, level: str = "info", metrics: Mapping[str, Any] | None = None
    ) -> None:
        """Adds an event."""
        self.events.append({
            "object": "fine_tuning.job.event",
            "id": f"ftevent-{secrets.token_hex(12)}",
            "created_at": int(time.time()),
            "level": level,
            "message": message,
            "type": "message" if metrics is None else "metrics",
            "data": metrics or {},
        })  # fmt: skip

    def progressed(self, event: Stepped | Evaluated, num_steps: int) -> None:
        """Notes a step, unless there are many, or an evaluation."""
        if isinstance(event, Evaluated):
            metrics = {
                "step": event.step, "valid_loss": event.loss,
                "valid_mean_token_accuracy": event.accuracy,
            }  # fmt: skip
            self.say(
                f"Step {event.step}/{num_steps}: validation loss={event.loss:.4f}", metrics=metrics
            )
        elif event.step in (1, num_steps) or event.step % -(-num_steps // MOST_TOLD) == 0:
            metrics = {
                "step": event.step, "total_steps": num_steps, "train_loss": event.loss,
                "learning_rate": event.learning_rate,
            }  # fmt: skip
            self.say(
                f"Step {event.step}/{num_steps}: training loss={event.loss:.4f}", metrics=metrics
            )

    def end(self, status: str, error: Mapping[str, Any] | None = None) -> None:
        """Ends the job; `error` has a code, a message and perhaps a param."""
        self.status, self.finished_at = status, time.time()
        if error is not None:
            self.error = {"param": None, **error}
            self.say(str(error["message"]), "error")

    def metrics(self) -> dict[int, dict[str, Any]]:
        """Returns what is known of steps, in their order."""
        steps: dict[int, dict[str, Any]] = {}
        for event in self.events:
            if event["type"] == "metrics":
                steps.setdefault(event["data"]["step"], {}).update(event["data"])
        return dict(sorted(steps.items()))

    def metrics_csv(self) -> bytes:
        """Returns these as CSV, in OpenAI's columns."""
        text = io.StringIO()
        writer = csv.DictWriter(text, _COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.metrics().values())
        return text.getvalue().encode()
