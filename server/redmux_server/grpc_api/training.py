"""TrainingService of gRPC: protobuf in, protobuf out, nothing else."""

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from redmux.errors import InvalidArgumentError
from redmux.v1 import training_service_pb2 as pb
from redmux.v1.training_service_pb2_grpc import TrainingServiceServicer
from redmux_adapters.train import Evaluated, Stepped
from redmux_adapters.train.inline import InlineTask
from redmux_server.grpc_api.call_keys import CallKeys
from redmux_server.grpc_api.chats import plain_messages
from redmux_server.grpc_api.converted import Converted, fill_page
from redmux_server.training.job import Job, JobState, JobTask, TaskState
from redmux_server.training.service import TrainingService

_DEFAULT_PAGE = 100
_MAX_PAGE = 1000
_JOB_STATES = {
    JobState.QUEUED: pb.JOB_STATE_QUEUED,
    JobState.RUNNING: pb.JOB_STATE_RUNNING,
    JobState.FINISHED: pb.JOB_STATE_FINISHED,
    JobState.CANCELLED: pb.JOB_STATE_CANCELLED,
    JobState.FAILED: pb.JOB_STATE_FAILED,
}
_TASK_STATES = {
    TaskState.QUEUED: pb.TASK_STATE_QUEUED,
    TaskState.RUNNING: pb.TASK_STATE_RUNNING,
    TaskState.COMPLETED: pb.TASK_STATE_COMPLETED,
    TaskState.STOPPED_EARLY: pb.TASK_STATE_STOPPED_EARLY,
    TaskState.DIVERGED: pb.TASK_STATE_DIVERGED,
    TaskState.CANCELLED: pb.TASK_STATE_CANCELLED,
    TaskState.FAILED: pb.TASK_STATE_FAILED,
}


class TrainingServicer(TrainingServiceServicer):
    """Adapters that are trained while the server runs."""

    def __init__(self, service: TrainingService, keys: CallKeys) -> None:
        self._service = service
        self._keys = keys

    async def CreateJob(self, request: pb.CreateJobRequest, context: Any) -> pb.CreateJobResponse:
        """Checks and queues a job."""
        job = await self._service.create(
            Converted(request.tasks, lambda _, task: task.adapter),
            lambda: [_task(index, task) for index, task in enumerate(request.tasks)],
            request.replace,
            request.request_id,
            self._keys.tenant(context),
        )
        return pb.CreateJobResponse(job=self._job(job))

    async def GetJob(self, request: pb.GetJobRequest, context: Any) -> pb.GetJobResponse:
        """Returns a job as it stands."""
        job = self._service.get(request.id, self._keys.tenant(context))
        return pb.GetJobResponse(job=self._job(job))

    async def ListJobs(self, request: pb.ListJobsRequest, context: Any) -> pb.ListJobsResponse:
        """Returns a page of the caller's jobs, the newest first; a page's token is its last id."""
        if request.page_size < 0:
            raise InvalidArgumentError(f"page_size is {request.page_size}, must be 0 or more")
        size = min(request.page_size or _DEFAULT_PAGE, _MAX_PAGE)
        tenant = self._keys.tenant(context)
        found = self._service.page(request.page_token, size + 1, tenant)
        page, has_more = fill_page(map(self._job, found), size)
        return pb.ListJobsResponse(jobs=page, next_page_token=page[-1].id if has_more else "")

    async def WatchJob(
        self, request: pb.WatchJobRequest, context: Any
    ) -> AsyncIterator[pb.WatchJobResponse]:
        """Streams what happens to a job until it has ended."""
        job = self._service.get(request.id, self._keys.tenant(context))
        async with aclosing(job.watch()) as events:
            async for event in events:
                if isinstance(event, Job):
                    yield pb.WatchJobResponse(job=self._job(event))
                elif isinstance(event, Stepped):
                    yield pb.WatchJobResponse(step=_step(event))
                else:
                    yield pb.WatchJobResponse(evaluation=_evaluation(event))

    async def CancelJob(self, request: pb.CancelJobRequest, context: Any) -> pb.CancelJobResponse:
        """Ends a job or some of its tasks."""
        job = await self._service.cancel(request.id, request.adapters, self._keys.tenant(context))
        return pb.CancelJobResponse(job=self._job(job))

    def _job(self, job: Job) -> pb.Job:
        message = pb.Job(
            id=job.id,
            state=_JOB_STATES[job.state],
            detail=job.detail,
            tasks=[_job_task(task) for task in job.tasks],
            num_ahead=self._service.num_ahead(job),
        )
        message.created_at.FromDatetime(job.created_at)
        if job.started_at is not None:
            message.started_at.FromDatetime(job.started_at)
        if job.ended_at is not None:
            message.ended_at.FromDatetime(job.ended_at)
        return message


def _job_task(task: JobTask) -> pb.JobTask:
    return pb.JobTask(
        adapter=task.name,
        state=_TASK_STATES[task.state],
        detail=task.detail,
        step=task.step,
        num_steps=task.num_steps,
        loss=task.loss,
        best=None if task.best is None else _evaluation(task.best),
        num_tokens=task.num_tokens,
        num_examples=task.num_examples,
        num_held_out=task.num_held_out,
        digest=task.digest,
    )


def _step(event: Stepped) -> pb.TrainingStep:
    return pb.TrainingStep(
        adapter=event.task,
        step=event.step,
        num_steps=event.num_steps,
        loss=event.loss,
        learning_rate=event.learning_rate,
        grad_norm=event.grad_norm,
        num_tokens=event.num_tokens,
    )


def _evaluation(event: Evaluated) -> pb.TrainingEvaluation:
    return pb.TrainingEvaluation(
        adapter=event.task,
        step=event.step,
        loss=event.loss,
        accuracy=event.accuracy,
        is_best=event.is_best,
        correlation=event.correlation,
    )


def _task(index: int, message: pb.TrainingTask) -> InlineTask:
    place = f"tasks[{index}]"
    return InlineTask(
        name=message.adapter,
        records=_records(f"{place}.records", message.records),
        valid=_records(f"{place}.valid", message.valid),
        options=_options(place, message.options),
    )


def _records(place: str, messages: Sequence[pb.TrainingRecord]) -> Sequence[Mapping[str, Any]]:
    return Converted(messages, lambda index, message: _record(f"{place}[{index}]", message))


def _record(place: str, message: pb.TrainingRecord) -> dict[str, Any]:
    form = message.WhichOneof("form")
    if form == "pair":
        pair: dict[str, Any] = {
            "prompt": message.pair.prompt, "completion": message.pair.completion
        }  # fmt: skip
        if message.pair.HasField("prompt_pair"):
            pair["prompt_pair"] = message.pair.prompt_pair
        return pair
    if form == "chat":
        return {"messages": plain_messages(place, message.chat)}
    if form is None:
        raise InvalidArgumentError(f"{place} is empty; set pair, chat, labelled or scored")
    text: pb.LabelledText | pb.ScoredText
    text = message.labelled if form == "labelled" else message.scored
    fields: dict[str, Any] = {"text": text.text}
    if text.HasField("text_pair"):
        fields["text_pair"] = text.text_pair
    if isinstance(text, pb.LabelledText):
        return {**fields, "label": text.label}
    return {**fields, "score": text.score}


def _options(place: str, message: pb.TrainingOptions) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for field, value in message.ListFields():
        values[field.name] = list(value) if field.name == "labels" else value
    turns = values.get("prompt_format", "")
    if turns.startswith("{"):
        try:
            values["prompt_format"] = json.loads(turns)
        except (ValueError, RecursionError) as err:
            raise InvalidArgumentError(
                f"{place}.options.prompt_format is not valid JSON: {err}"
            ) from None
    return values
