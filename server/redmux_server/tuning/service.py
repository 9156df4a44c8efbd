"""TuningService: fine-tuning jobs of one file and one adapter, over TrainingService."""

import asyncio
import contextlib
import logging
import re
import secrets
import time
from dataclasses import asdict
from pathlib import Path

from redmux.errors import (
    AlreadyExistsError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    RedmuxError,
)
from redmux.training_data import Record
from redmux_adapters.train.inline import InlineTask
from redmux_server.files.records import Records
from redmux_server.files.store import FileStore, StoredFile, new_id
from redmux_server.internal_errors import told
from redmux_server.registry.names import check_name, spare_name
from redmux_server.training.check import MAX_PASS_TOKENS
from redmux_server.training.job import Job, TaskState
from redmux_server.training.service import TrainingService
from redmux_server.tuning.data import read_dataset
from redmux_server.tuning.job import MOST_TOLD, Hyperparameters, TuningJob

logger = logging.getLogger(__name__)

_MOST_KEPT = 100  # jobs of a tenant that have ended
_MOST_SUFFIX_CHARS = 64
_EVAL_EVERY = 50  # steps, where an epoch has as many
_STOP_S = 5.0
_NAME_IS_NOT_FREE = AlreadyExistsError, NotFoundError, PermissionDeniedError
_PLACE = re.compile(r"tasks\[0\](?:\.(records|valid)\[(\d+)\])?")
_SUCCESSES = (TaskState.COMPLETED, TaskState.STOPPED_EARLY)


class TuningService:
    """Takes jobs, and tells what TrainingService makes of them.

    Belongs to the event loop. A tenant sees its own jobs only.
    """

    def __init__(self, training: TrainingService, files: FileStore, folder: Path | None) -> None:
        self._training = training
        self._files = files
        self._records = Records(folder, "fine-tuning job")
        self._jobs: dict[str, TuningJob] = {}  # by id, in the order of their creation
        self._trained_by: dict[str, str] = {}  # job -> that of TrainingService, once there is one
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def start(self) -> None:
        """Knows again what earlier runs kept; jobs that they have not ended have failed."""
        for record in await asyncio.to_thread(self._records.load):
            try:
                settled = Hyperparameters(**record.pop("hyperparameters"))
                job = TuningJob(**record, hyperparameters=settled)
            except (TypeError, KeyError) as err:
                logger.error("a fine-tuning job cannot be used: %s", err)
                continue
            self._jobs[job.id] = job
            if not job.has_ended:
                job.end("failed", {
                    "code": "server_error", "message": "the server ended before the job did"
                })  # fmt: skip
                with contextlib.suppress(RedmuxError):
                    await self._write(job)

    async def stop(self) -> None:
        """Lets jobs tell their ends, after TrainingService has stopped."""
        tasks = list(self._tasks.values())
        if tasks:
            await asyncio.wait(tasks, timeout=_STOP_S)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def create(self, job: TuningJob) -> TuningJob:
        """Takes a job, whose files are looked at after that.

        Raises NotFoundError for a file that is none of the tenant's, InvalidArgumentError for one
        that was sent for something else and for a suffix that gives no name,
        ResourceExhaustedError where jobs wait or files lie already, FailedPreconditionError where
        training is off.
        """
        for name in ("training_file", "validation_file"):
            file_id = getattr(job, name)
            if file_id is None:
                continue
            file = self._files.get(file_id, job.tenant, name)
            if file.purpose != "fine-tune":
                raise InvalidArgumentError(
                    f"{name} is {file_id!r}, which was sent for {file.purpose}, not for fine-tune"
                )
        _name_of(job)
        self._training.check_room(job.tenant)
        self._files.check_room(job.tenant)
        job.say(f"Created fine-tuning job: {job.id}")
        job.say(f"Validating training file: {job.training_file}")
        self._jobs[job.id] = job
        try:
            await self._write(job)
        except RedmuxError:
            del self._jobs[job.id]
            raise
        logger.info("%s is created", job.id)
        self._tasks[job.id] = asyncio.create_task(self._run(job))
        await self._forget_oldest(job.tenant)
        return job

    def get(self, job_id: str, tenant: str) -> TuningJob:
        """Returns a job of the tenant; raises NotFoundError if there is none of that id."""
        job = self._jobs.get(job_id)
        if job is None or job.tenant != tenant:
            raise NotFoundError(f"no fine-tuning job {job_id[:80]!r}; see GET /v1/fine_tuning/jobs")
        return job

    def all_of(self, tenant: str) -> list[TuningJob]:
        """Returns the jobs of a tenant, the newest first."""
        return [job for job in reversed(self._jobs.values()) if job.tenant == tenant]

    async def cancel(self, job_id: str, tenant: str) -> TuningJob:
        """Ends a job and returns it; raises InvalidArgumentError where it has ended."""
        job = self.get(job_id, tenant)
        if job.has_ended:
            raise InvalidArgumentError(f"{job.id} is over ({job.status}) and cannot be cancelled")
        if job.id in self._trained_by:
            task = self._tasks[job.id]
            await self._training.cancel(self._trained_by[job.id], (), tenant)
            await asyncio.wait([task])
        else:
            job.end("cancelled")  # what looks at its files notices that
            job.say("The job was cancelled")
            await self._write(job)
        return job

    async def _run(self, job: TuningJob) -> None:
        try:
            trained = await self._queue(job)
            if job.has_ended:
                await self._training.cancel(trained.id, (), job.tenant)
                return
            await self._follow(job, trained)
        except RedmuxError as err:
            self._fail(job, err)
        except Exception as err:
            self._fail(job, told(err))
        finally:
            self._tasks.pop(job.id, None)
            self._trained_by.pop(job.id, None)
        with contextlib.suppress(RedmuxError):  # it is told as long as the server runs
            await self._write(job)
        logger.info("%s %s", job.id, job.status)

    async def _queue(self, job: TuningJob) -> Job:
        """Checks the files, and hands the job over to be trained."""
        train = await self._read(job, job.training_file)
        valid = await self._read(job, job.validation_file) if job.validation_file else None
        rate = await self._training.default_learning_rate(job.tenant)
        prepared = _Prepared(job, rate, train, valid)
        name = _name_of(job)
        try:
            try:
                return await self._create(job, name, prepared)
            except _NAME_IS_NOT_FREE:
                return await self._create(job, spare_name(name), prepared)
        except InvalidArgumentError as err:
            raise prepared.blamed(err) from None

    async def _create(self, job: TuningJob, name: str, prepared: "_Prepared") -> Job:
        return await self._training.create(
            [name], lambda: [prepared.task(name)], False, job.id, job.tenant
        )

    async def _read(self, job: TuningJob, file_id: str) -> tuple[StoredFile, bytes]:
        file = self._files.get(file_id, job.tenant)
        return file, await self._files.read(file)

    async def _follow(self, job: TuningJob, trained: Job) -> None:
        """Tells of the training until it has ended, and of what came out."""
        self._trained_by[job.id] = trained.id
        job.status = "queued"
        job.say("Files validated, moving job to queued state")
        await self._write(job)
        (task,) = trained.tasks
        async with contextlib.aclosing(trained.watch()) as events:
            async for event in events:
                if not isinstance(event, Job):
                    job.progressed(event, task.num_steps)
                elif event.started_at is not None and job.status == "queued":
                    job.status = "running"
                    job.say("Fine-tuning job started")
        if task.state is TaskState.CANCELLED:
            job.say("The job was cancelled")
            job.end("cancelled")
        elif task.state not in _SUCCESSES:
            detail = task.detail or trained.detail or "the job ended before it was complete"
            job.end("failed", {"code": "training_failed", "message": detail})
        else:
            await self._succeed(job, trained)

    async def _succeed(self, job: TuningJob, trained: Job) -> None:
        (task,) = trained.tasks
        job.trained_tokens = task.num_tokens
        job.fine_tuned_model = task.name
        best = task.best.step if task.best is not None else task.step
        metrics = job.metrics().get(best, {"step": best})
        job.checkpoint = {
            "id": f"ftckpt-{secrets.token_hex(12)}", "created_at": int(time.time()),
            "step_number": best,
            "metrics": {
                "step": best, "train_loss": metrics.get("train_loss"),
                "full_valid_loss": metrics.get("valid_loss"),
                "full_valid_mean_token_accuracy": metrics.get("valid_mean_token_accuracy"),
            },
        }  # fmt: skip
        try:
            file = await self._files.keep(
                new_id(), "step_metrics.csv", "fine-tune-results", job.metrics_csv(), job.tenant
            )
            job.result_files = [file.id]
        except RedmuxError as err:  # the adapter is there all the same
            job.say(f"The metrics could not be kept: {err.message}", "warn")
        job.say(f"New fine-tuned model created: {task.name}")
        job.say("The job has successfully completed")
        job.end("succeeded")

    def _fail(self, job: TuningJob, err: RedmuxError) -> None:
        if job.has_ended:
            return
        code, param = err.status.name.lower(), None
        if isinstance(err, _FaultyFile):
            code, param = f"invalid_{err.param}", err.param
        job.end("failed", {"code": code, "message": err.message, "param": param})

    async def _forget_oldest(self, tenant: str) -> None:
        ended = [job for job in self._jobs.values() if job.tenant == tenant and job.has_ended]
        for job in ended[:-_MOST_KEPT]:
            del self._jobs[job.id]
            await self._records.remove(job.id)

    async def _write(self, job: TuningJob) -> None:
        await self._records.write(job.id, asdict(job))


class _FaultyFile(InvalidArgumentError):
    """One of the files is wrong, named by its parameter."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


class _Prepared:
    """The data of a job; `task` is called in another thread than the rest."""

    def __init__(
        self, job: TuningJob, rate: float, train: tuple[StoredFile, bytes],
        valid: tuple[StoredFile, bytes] | None,
    ) -> None:  # fmt: skip
        """`rate` is the learning rate by default."""
        self._job = job
        self._rate = rate
        self._files = {"records": train, "valid": valid}
        self._records: dict[str, list[Record]] = {"records": [], "valid": []}
        self._read = "records"  # what was read last

    def task(self, name: str) -> InlineTask:
        """Returns what is trained, of this name; raises InvalidArgumentError with lines."""
        for kind, given in self._files.items():
            if given is not None:
                file, data = given
                self._read = kind
                self._records[kind] = read_dataset(file.filename or file.id, data)
        train, valid = self._records["records"], self._records["valid"]
        chosen = self._job.hyperparameters
        chosen.settle(len(train))
        assert chosen.n_epochs is not None
        assert chosen.batch_size is not None
        assert chosen.learning_rate_multiplier is not None
        in_epoch = -(-len(train) // chosen.batch_size)
        options = {
            "epochs": chosen.n_epochs,
            "batch_size": chosen.batch_size,
            "learning_rate": chosen.learning_rate_multiplier * self._rate,
            "seed": self._job.seed,
            "eval_every": max(
                min(_EVAL_EVERY, in_epoch), -(-chosen.n_epochs * in_epoch // MOST_TOLD)
            ),
            "valid_share": 0.0,
            "max_length": MAX_PASS_TOKENS,
        }
        return InlineTask(name, [r.fields for r in train], [r.fields for r in valid], options)

    def blamed(self, err: InvalidArgumentError) -> InvalidArgumentError:
        """Returns the error with lines of files in place of records of a task."""
        found = _PLACE.search(err.message)
        # A line that could not be read is of the file that was read last.
        kind = self._read if found is None else found[1] or "records"
        message = _PLACE.sub(self._place, err.message)
        return _FaultyFile(message, "validation_file" if kind == "valid" else "training_file")

    def _place(self, found: re.Match[str]) -> str:
        if found[1] is None:
            return "the job"
        return self._records[found[1]][int(found[2])].where


def _name_of(job: TuningJob) -> str:
    """Returns the name of the adapter: its suffix, in the letters that names have."""
    if not job.suffix:
        return f"ft-{job.id.rpartition('-')[2][:8]}"
    if len(job.suffix) > _MOST_SUFFIX_CHARS:
        raise InvalidArgumentError(
            f"suffix has {len(job.suffix)} characters, the limit is {_MOST_SUFFIX_CHARS}"
        )
    name = re.sub(r"[^a-z0-9._/-]+", "-", job.suffix.lower()).strip("-")
    try:
        return check_name(name)
    except InvalidArgumentError as err:
        raise InvalidArgumentError(f"suffix is {job.suffix!r}: {err.message}") from None
