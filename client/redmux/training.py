"""Training jobs of a server: `client.jobs`, for both clients."""

from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterable, Iterator, Sequence
from contextlib import aclosing, closing

from redmux import _job_calls
from redmux._channel import WATCH_TIMEOUT_S, AsyncConnection, Connection
from redmux.job_types import Job, JobEvent, TrainingTask
from redmux.v1 import training_service_pb2 as pb


class Jobs:
    """The training jobs of a server: `client.jobs`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def create(
        self,
        tasks: Iterable[TrainingTask],
        *,
        replace: bool = False,
        timeout_s: float | None = None,
    ) -> Job:
        """Queues a job that trains the adapters of all tasks together, and returns it.

        Each adapter is published under its name when its training ends well; `replace` lets it
        replace one of that name. Raises InvalidArgumentError, naming task, record and field, for
        what cannot be trained, AlreadyExistsError for a name that is taken, ResourceExhaustedError
        for a full queue and FailedPreconditionError where the server does not train.
        """
        request = _job_calls.create_request(tasks, replace)
        response = self._connection.unary(self._connection.training.CreateJob, request, timeout_s)
        return _job_calls.job(response.job)

    def get(self, job_id: str) -> Job:
        """Returns the job of that id as it stands, or raises NotFoundError."""
        request = pb.GetJobRequest(id=_job_calls.check_id(job_id))
        response = self._connection.unary(self._connection.training.GetJob, request)
        return _job_calls.job(response.job)

    def __iter__(self) -> Iterator[Job]:
        return self.list()

    def list(self) -> Iterator[Job]:
        """Yields the jobs of this client's API key, the newest first, fetched page by page."""
        request = pb.ListJobsRequest()
        while True:
            page = self._connection.unary(self._connection.training.ListJobs, request)
            for message in page.jobs:
                yield _job_calls.job(message)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def watch(
        self, job_id: str, *, timeout_s: float | None = None
    ) -> Generator[JobEvent, None, None]:
        """Yields the job as it stands, its steps and evaluations as they come, and the job again.

        The job comes whenever a state in it changes; the last value is the job that has ended.
        Who watches does not matter to the job. The call has a week unless `timeout_s` says
        otherwise.
        """
        request = pb.WatchJobRequest(id=_job_calls.check_id(job_id))
        deadline_s = self._connection.settings.deadline_s(timeout_s, WATCH_TIMEOUT_S)
        return self._events(request, deadline_s)

    def _events(
        self, request: pb.WatchJobRequest, deadline_s: float
    ) -> Generator[JobEvent, None, None]:
        method = self._connection.training.WatchJob
        with closing(self._connection.stream(method, request, deadline_s)) as messages:
            for message in messages:
                event = _job_calls.event(message)
                if event is not None:
                    yield event

    def cancel(self, job_id: str, adapters: Sequence[str] = ()) -> Job:
        """Ends a job, or its tasks for these adapters, and returns it.

        What has ended before stays as it is, and so do adapters that were published.
        """
        request = _job_calls.cancel_request(job_id, adapters)
        response = self._connection.unary(self._connection.training.CancelJob, request)
        return _job_calls.job(response.job)


class AsyncJobs:
    """The training jobs of a server: `client.jobs`."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection

    async def create(
        self,
        tasks: Iterable[TrainingTask],
        *,
        replace: bool = False,
        timeout_s: float | None = None,
    ) -> Job:
        """Queues a job that trains the adapters of all tasks together, and returns it.

        Each adapter is published under its name when its training ends well; `replace` lets it
        replace one of that name. Raises InvalidArgumentError, naming task, record and field, for
        what cannot be trained, AlreadyExistsError for a name that is taken, ResourceExhaustedError
        for a full queue and FailedPreconditionError where the server does not train.
        """
        request = _job_calls.create_request(tasks, replace)
        response = await self._connection.unary(
            self._connection.training.CreateJob, request, timeout_s
        )
        return _job_calls.job(response.job)

    async def get(self, job_id: str) -> Job:
        """Returns the job of that id as it stands, or raises NotFoundError."""
        request = pb.GetJobRequest(id=_job_calls.check_id(job_id))
        response = await self._connection.unary(self._connection.training.GetJob, request)
        return _job_calls.job(response.job)

    def __aiter__(self) -> AsyncIterator[Job]:
        return self.list()

    async def list(self) -> AsyncIterator[Job]:
        """Yields the jobs of this client's API key, the newest first, fetched page by page."""
        request = pb.ListJobsRequest()
        while True:
            page = await self._connection.unary(self._connection.training.ListJobs, request)
            for message in page.jobs:
                yield _job_calls.job(message)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def watch(
        self, job_id: str, *, timeout_s: float | None = None
    ) -> AsyncGenerator[JobEvent, None]:
        """Yields the job as it stands, its steps and evaluations as they come, and the job again.

        The job comes whenever a state in it changes; the last value is the job that has ended.
        Who watches does not matter to the job. The call has a week unless `timeout_s` says
        otherwise.
        """
        request = pb.WatchJobRequest(id=_job_calls.check_id(job_id))
        deadline_s = self._connection.settings.deadline_s(timeout_s, WATCH_TIMEOUT_S)
        return self._events(request, deadline_s)

    async def _events(
        self, request: pb.WatchJobRequest, deadline_s: float
    ) -> AsyncGenerator[JobEvent, None]:
        method = self._connection.training.WatchJob
        async with aclosing(self._connection.stream(method, request, deadline_s)) as messages:
            async for message in messages:
                event = _job_calls.event(message)
                if event is not None:
                    yield event

    async def cancel(self, job_id: str, adapters: Sequence[str] = ()) -> Job:
        """Ends a job, or its tasks for these adapters, and returns it.

        What has ended before stays as it is, and so do adapters that were published.
        """
        request = _job_calls.cancel_request(job_id, adapters)
        response = await self._connection.unary(self._connection.training.CancelJob, request)
        return _job_calls.job(response.job)
