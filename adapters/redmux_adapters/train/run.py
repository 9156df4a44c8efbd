"""Run: a trainer with everything that is kept on disk beside it."""

import time
from pathlib import Path

from redmux.errors import FailedPreconditionError

from ..format.files import write_folder
from .checkpoint import CHECKPOINT_NAME, read_checkpoint, write_checkpoint
from .events import Event, Finished, Stepped
from .job import Job
from .metrics_log import MetricsLog
from .trainer import Trainer


class Run:
    """Drives a trainer step by step; writes metrics, checkpoints and adapters into the folders.

    A task's adapter is written when its training ends, unless it diverged. With `resume` a run goes
    on from its last checkpoint, or starts where there is none. Raises FailedPreconditionError where
    an interrupted run is in the way, or is of another job.
    """

    def __init__(
        self, job: Job, trainer: Trainer, *, resume: bool = False, tensorboard: bool = False
    ) -> None:
        self.job = job
        self.trainer = trainer
        self._output = Path(job.output).expanduser()
        self._output.mkdir(parents=True, exist_ok=True)
        state = read_checkpoint(self._output)
        if state is not None:
            if not resume:
                raise FailedPreconditionError(
                    f"{self._output} holds an interrupted run; go on with it by --resume, or "
                    f"remove its {CHECKPOINT_NAME}"
                )
            trainer.restore(state["trainer"])
        self._num_steps = 0 if state is None else state["num_steps"]
        self._elapsed_before_s = 0.0 if state is None else state["elapsed_s"]
        self._start = time.monotonic()
        steps = {learner.task.name: learner.step for learner in trainer.learners}
        self._log = MetricsLog(self._output, steps, tensorboard)
        self.tokens_per_s = 0.0  # of the last step, all tasks together

    @property
    def elapsed_s(self) -> float:
        """Time spent on the run, before an interruption and since."""
        return self._elapsed_before_s + time.monotonic() - self._start

    def advance(self) -> list[Event]:
        """Takes one step of every active task and puts what follows from it on disk."""
        start = time.monotonic()
        events = self.trainer.step()
        num_tokens = sum(event.num_tokens for event in events if isinstance(event, Stepped))
        self.tokens_per_s = num_tokens / (time.monotonic() - start)
        self._log.write(events, self.tokens_per_s, self.elapsed_s)
        for event in events:
            if isinstance(event, Finished) and event.ending != "diverged":
                write_folder(self.trainer.adapter(event.task), self.job.folder(event.task))
        self._num_steps += 1
        if not self.trainer.active:
            (self._output / CHECKPOINT_NAME).unlink(missing_ok=True)
        elif self._num_steps % self.job.checkpoint_every == 0:
            state = {"num_steps": self._num_steps, "elapsed_s": self.elapsed_s}
            write_checkpoint(self._output, state | {"trainer": self.trainer.state()})
        return events

    def close(self) -> None:
        """Closes the files and takes the edits off the base model."""
        self._log.close()
        self.trainer.close()
