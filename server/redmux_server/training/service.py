"""TrainingService: jobs of tenants, trained one at a time beside serving, below every protocol."""

import asyncio
import functools
import logging
import signal
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

from redmux.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    RedmuxError,
    ResourceExhaustedError,
    UnavailableError,
)
from redmux_adapters.train import Evaluated, Stepped
from redmux_adapters.train.inline import InlineTask
from redmux_server.fair_thread import FairThread
from redmux_server.metrics import Metrics
from redmux_server.registry.names import check_name, spare_name
from redmux_server.registry.registry import AdapterRegistry
from redmux_server.training.check import JobChecker, TrainingSetup, check_num_tasks
from redmux_server.training.job import Job, JobState, JobTask, TaskState, in_order_of_turns
from redmux_server.training.process import Message, TrainingProcess

logger = logging.getLogger(__name__)

_MOST_KEPT = 100  # jobs of a tenant that have ended
_MAX_REQUEST_ID_CHARS = 64
_NAME_IS_NOT_FREE = AlreadyExistsError, NotFoundError, PermissionDeniedError
_ENDINGS = {"completed": TaskState.COMPLETED, "stopped early": TaskState.STOPPED_EARLY}


class TrainingService:
    """Checks and queues jobs, trains one at a time in a process, publishes what they come to.

    Belongs to the event loop. A tenant sees its own jobs only.
    """

    def __init__(
        self,
        setup: TrainingSetup | None,
        registry: AdapterRegistry,
        metrics: Metrics,
        *,
        max_queued: int,
        share: float,
        is_busy: Callable[[], bool],
        on_publish: Callable[[], None],
        start_process: Callable[[], Awaitable[TrainingProcess]] = TrainingProcess.start,
    ) -> None:
        """`setup` is None where training is off.

        `max_queued` bounds the jobs of a tenant that wait or are being checked. `share` is the part
        of the time that training gets while `is_busy`.
        """
        self._setup = setup
        self._registry = registry
        self._metrics = metrics
        self._max_queued = max_queued
        self._share = share
        self._is_busy = is_busy
        self._on_publish = on_publish
        self._start_process = start_process
        # One thread: the checker belongs to it.
        self._checking = FairThread("job checker")
        self._checker = None if setup is None else JobChecker(setup)
        self._num_checked: dict[str, int] = {}  # tenant -> jobs that are being checked
        self._jobs: dict[str, Job] = {}  # by id, in the order of their creation
        self._queue: list[Job] = []
        self._last_turn: dict[str, int] = {}
        self._running: tuple[Job, TrainingProcess] | None = None
        self._trainer: asyncio.Task[None] | None = None
        self._is_stopping = False

    @property
    def trains(self) -> bool:
        """Whether jobs are taken."""
        return self._setup is not None

    async def create(
        self,
        names: Sequence[str],
        read: Callable[[], Sequence[InlineTask]],
        replace: bool,
        request_id: str,
        tenant: str,
    ) -> Job:
        """Checks and queues a job that trains adapters of these names.

        `read` returns its tasks; it is called in another thread, since there may be many records.

        Raises InvalidArgumentError, naming task, record and field; AlreadyExistsError for a name
        that is taken; ResourceExhaustedError for a full queue or a job that is too large;
        FailedPreconditionError where training is off. Nothing is queued then.
        """
        checker = self._open_checker()
        if len(request_id) > _MAX_REQUEST_ID_CHARS:
            raise InvalidArgumentError(
                f"request_id has {len(request_id)} characters, the limit is {_MAX_REQUEST_ID_CHARS}"
            )
        check_num_tasks(len(names))
        known = self._made_by(tenant, request_id)
        if known is not None:
            return known
        await self._check_free(names, replace, tenant)
        self._check_untrained(names, tenant)
        self.check_room(tenant)
        self._num_checked[tenant] = self._num_checked.get(tenant, 0) + 1
        try:
            tasks, payload = await self._checking.run(
                tenant, 1, functools.partial(_check, checker, read)
            )
        finally:
            self._num_checked[tenant] -= 1
        if self._is_stopping:
            raise UnavailableError("the server is shutting down")
        await self._check_free(names, replace, tenant)
        known = self._made_by(tenant, request_id)  # by a call beside this one
        if known is not None:
            return known
        self._check_untrained(names, tenant)
        job = Job(tenant, tasks, payload, replace, request_id)
        self._jobs[job.id] = job
        self._queue.append(job)
        logger.info("%s is queued, %d tasks", job.id, len(job.tasks))
        self._forget_oldest(tenant)
        self._observe()
        if self._trainer is None:
            self._trainer = asyncio.create_task(self._train_all())
        return job

    async def default_learning_rate(self, tenant: str) -> float:
        """Returns the rate that tasks without one of their own are trained at."""
        return await self._checking.run(tenant, 1, self._open_checker().default_learning_rate)

    def check_room(self, tenant: str) -> None:
        """Raises unless the tenant may create a job now, for the reasons that `create` has."""
        self._open_checker()
        num_waiting = sum(job.tenant == tenant for job in self._queue)
        if num_waiting + self._num_checked.get(tenant, 0) >= self._max_queued:
            raise ResourceExhaustedError(
                f"{self._max_queued} jobs wait already, which is the limit; cancel one or wait"
            )

    def get(self, job_id: str, tenant: str) -> Job:
        """Returns a job of the tenant; raises NotFoundError if there is none of that id."""
        job = self._jobs.get(job_id)
        if job is None or job.tenant != tenant:
            raise NotFoundError(f"no job {job_id[:80]!r}; see ListJobs")
        return job

    def page(self, after: str, size: int, tenant: str) -> list[Job]:
        """Returns up to `size` jobs of the tenant that were created before job `after`, or all."""
        jobs = [job for job in reversed(self._jobs.values()) if job.tenant == tenant]
        ids = [job.id for job in jobs]
        start = ids.index(after) + 1 if after in ids else 0
        return jobs[start : start + size]

    def num_ahead(self, job: Job) -> int:
        """Returns how many jobs will probably be trained before this one."""
        if job.state is not JobState.QUEUED:
            return 0
        ordered = in_order_of_turns(self._queue, self._last_turn)
        return ordered.index(job) + (self._running is not None)

    async def cancel(self, job_id: str, names: Sequence[str], tenant: str) -> Job:
        """Ends a job, or the tasks that train adapters of these names; returns the job.

        What has ended before stays as it is.
        """
        job = self.get(job_id, tenant)
        if len(names) > len(job.tasks):
            raise InvalidArgumentError(
                f"adapters: there are {len(names)}, but {job.id} trains {len(job.tasks)}"
            )
        tasks = [_task(job, name) for name in names] or job.tasks
        left = [task for task in tasks if not task.has_ended and not task.is_publishing]
        if all(task.has_ended or task in left for task in job.tasks):
            await self._cancel_all(job)
            return job
        for task in left:
            task.end(TaskState.CANCELLED)
            self._metrics.training_task(task.state.value)
            if self._running is not None and self._running[0] is job:
                await self._running[1].cancel(task.name)
        job.changed()
        return job

    async def stop(self) -> None:
        """Ends the training process; jobs that have not ended fail."""
        self._is_stopping = True
        for job in [*self._queue]:
            self._end(job, JobState.FAILED, "the server was shut down")
        if self._running is not None:
            await self._running[1].end()
        if self._trainer is not None:
            self._trainer.cancel()
            with suppress(asyncio.CancelledError):
                await self._trainer
        self._checking.close()

    def _open_checker(self) -> JobChecker:
        if self._checker is None:
            raise FailedPreconditionError(
                "this server does not train; start it with --training true"
            )
        return self._checker

    async def _cancel_all(self, job: Job) -> None:
        if job.ended.is_set():
            return
        job.is_cancelled = True
        if job in self._queue:
            self._end(job, JobState.CANCELLED)
            return
        if self._running is not None and self._running[0] is job:
            await self._running[1].end()
        await job.ended.wait()

    async def _train_all(self) -> None:
        """Trains the queued jobs, one after the other, until none is left."""
        try:
            while self._queue:
                job = in_order_of_turns(self._queue, self._last_turn)[0]
                self._queue.remove(job)
                self._last_turn[job.tenant] = max(self._last_turn.values(), default=-1) + 1
                await self._train(job)
        finally:
            self._trainer = None

    async def _train(self, job: Job) -> None:
        job.start()
        state, detail = JobState.FAILED, "internal error, see the server's log"
        try:
            detail = await self._drive(job)
            if not detail:
                state = JobState.FINISHED
        except asyncio.CancelledError:
            detail = "the server was shut down"
            raise
        except Exception:
            logger.exception("%s failed", job.id)
        finally:
            self._running = None
            if self._is_stopping:
                detail = "the server was shut down"
            if job.is_cancelled:
                state, detail = JobState.CANCELLED, ""
            self._end(job, state, detail)

    async def _drive(self, job: Job) -> str:
        """Trains a job in a process of its own; returns why it did not come to its end, or ""."""
        assert self._setup is not None
        process = await self._start_process()
        self._running = job, process
        self._observe()
        if job.is_cancelled or self._is_stopping:
            await process.end()
            return "cancelled"
        giving_way: asyncio.Task[None] | None = None
        failure = ""
        try:
            async for message in process.messages():
                if message.event == "ready":
                    giving_way = asyncio.create_task(process.give_way(self._is_busy, self._share))
                    await process.send_job(self._setup, job.payload)
                    job.payload = b""
                    for task in job.tasks:
                        if task.has_ended:  # cancelled in the queue
                            await process.cancel(task.name)
                elif message.event == "failed":
                    failure = message.fields["message"]
                else:
                    await self._take(job, message)
        finally:
            if giving_way is not None:
                giving_way.cancel()
            code = await process.end()
        if failure or all(task.has_ended for task in job.tasks):
            return failure
        return f"the training process ended by {_name_of(code)}"

    async def _take(self, job: Job, message: Message) -> None:
        fields = message.fields
        if message.event == "stepped":
            self._metrics.training_tokens.inc(fields["num_tokens"])
            job.progressed(Stepped(**fields))
        elif message.event == "evaluated":
            job.progressed(Evaluated(**fields))
        else:
            task = _task(job, fields["task"])
            if task.has_ended:  # cancelled meanwhile
                return
            if message.event == "diverged":
                task.end(TaskState.DIVERGED, fields["detail"])
            else:
                await self._publish(job, task, message.data, _ENDINGS[fields["ending"]])
            self._metrics.training_task(task.state.value)
            job.changed()

    async def _publish(self, job: Job, task: JobTask, data: bytes, state: TaskState) -> None:
        """Puts a trained adapter under its name, or if that was taken meanwhile, under a free one.

        In the second case the task has failed, but not lost what it was for.
        """
        task.is_publishing = True
        detail = ""
        try:
            try:
                put = self._registry.put(task.name, data, "", job.replace, job.tenant)
                published, _ = await put
            except _NAME_IS_NOT_FREE as err:
                name = spare_name(task.name)
                published, _ = await self._registry.put(name, data, "", False, job.tenant)
                state = TaskState.FAILED
                detail = f"{err.message}; what was trained is published as {name!r} instead"
        except RedmuxError as err:
            task.end(TaskState.FAILED, f"the adapter could not be published: {err.message}")
            return
        finally:
            task.is_publishing = False
        task.digest = published.digest
        task.end(state, detail)
        self._on_publish()

    def _end(self, job: Job, state: JobState, detail: str = "") -> None:
        open_tasks = [task for task in job.tasks if not task.has_ended]
        job.end(state, detail)
        for task in open_tasks:
            self._metrics.training_task(task.state.value)
        self._metrics.training_job(state.value)
        if job in self._queue:
            self._queue.remove(job)
        self._observe()
        logger.info("%s %s%s", job.id, state.value, f": {detail}" if detail else "")

    def _made_by(self, tenant: str, request_id: str) -> Job | None:
        if not request_id:
            return None
        jobs = (job for job in self._jobs.values() if job.tenant == tenant)
        return next((job for job in jobs if job.request_id == request_id), None)

    async def _check_free(self, names: Sequence[str], replace: bool, tenant: str) -> None:
        """Raises unless the tenant may publish under each of these names."""
        owners = await self._registry.owners(map(check_name, names))
        for index, name in enumerate(names):
            try:
                self._registry.check_may_put(name, owners.get(name), replace, tenant)
            except RedmuxError as err:
                raise type(err)(f"tasks[{index}]: {err.message}") from None
            if not replace and name in owners:
                raise AlreadyExistsError(
                    f"tasks[{index}]: adapter {name!r} exists; pass replace to replace it"
                )

    def _check_untrained(self, names: Sequence[str], tenant: str) -> None:
        """Raises where a name occurs twice, or a job that has not ended trains it."""
        trained = {
            task.name: job
            for job in self._jobs.values()
            if job.tenant == tenant and not job.ended.is_set()
            for task in job.tasks
            if not task.has_ended
        }
        seen: set[str] = set()
        for index, name in enumerate(names):
            if name in seen:
                raise InvalidArgumentError(f"tasks[{index}]: adapter {name!r} occurs twice")
            if name in trained:
                raise AlreadyExistsError(
                    f"tasks[{index}]: {trained[name].id} trains adapter {name!r} already; cancel "
                    "it first"
                )
            seen.add(name)

    def _forget_oldest(self, tenant: str) -> None:
        jobs = self._jobs.values()
        ended = [job.id for job in jobs if job.tenant == tenant and job.ended.is_set()]
        for job_id in ended[:-_MOST_KEPT]:
            del self._jobs[job_id]

    def _observe(self) -> None:
        self._metrics.training_state(int(self._running is not None), len(self._queue))


def _check(
    checker: JobChecker, read: Callable[[], Sequence[InlineTask]]
) -> tuple[list[JobTask], bytes]:
    return checker.check(read())


def _task(job: Job, name: str) -> JobTask:
    task = job.task(name)
    if task is None:
        known = ", ".join(task.name for task in job.tasks)
        raise InvalidArgumentError(f"{job.id} trains no adapter {name[:80]!r}; it has {known}")
    return task


def _name_of(code: int) -> str:
    """Returns how a process ended, for people."""
    if code >= 0:
        return f"exit code {code}"
    with suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"
