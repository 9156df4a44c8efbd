"""Training jobs: arguments to messages and messages to values. No I/O, shared by both clients."""

import json
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar, get_args

from google.protobuf.timestamp_pb2 import Timestamp

from redmux import _calls
from redmux._arguments import fill
from redmux._nearest import nearest
from redmux.errors import InvalidArgumentError, RedmuxError
from redmux.job_types import (
    Job,
    JobEvent,
    JobState,
    JobTask,
    TaskState,
    TrainingEvaluation,
    TrainingStep,
    TrainingTask,
)
from redmux.training_data import Faults
from redmux.v1 import inference_service_pb2 as inference_pb2
from redmux.v1 import training_service_pb2 as pb

_JOB_STATES: dict[int, JobState] = {
    pb.JobState.Value(f"JOB_STATE_{state.upper()}"): state for state in get_args(JobState)
}
_TASK_STATES: dict[int, TaskState] = {
    pb.TaskState.Value(f"TASK_STATE_{state.upper()}"): state for state in get_args(TaskState)
}
OPTION_FIELDS = pb.TrainingOptions.DESCRIPTOR.fields_by_name
_State = TypeVar("_State", JobState, TaskState)
_FORMS = "prompt and completion; messages; text and label; text and score"


def create_request(tasks: Iterable[TrainingTask], replace: bool) -> pb.CreateJobRequest:
    """Returns the message that creates a job, with an id so that it is created once.

    Raises InvalidArgumentError for what no message can hold, naming task, record and field; all
    unusable records at once.
    """
    faults = Faults()
    messages = [_task(f"tasks[{index}]", task, faults) for index, task in enumerate(tasks)]
    faults.raise_any()
    return pb.CreateJobRequest(tasks=messages, replace=replace, request_id=secrets.token_hex(16))


def _task(place: str, task: TrainingTask, faults: Faults) -> pb.TrainingTask:
    return pb.TrainingTask(
        adapter=_calls.check_name(task.adapter),
        records=_records(f"{place}.records", task.records, faults),
        valid=_records(f"{place}.valid", task.valid, faults),
        options=_options(place, task.options),
    )


def _records(
    place: str, records: Sequence[Mapping[str, Any]], faults: Faults
) -> Iterator[pb.TrainingRecord]:
    if isinstance(records, str | bytes | Mapping):
        raise InvalidArgumentError(f"{place} is {type(records).__name__}; give a list of records")
    for index, record in enumerate(records):
        try:
            yield record_message(record)
        except InvalidArgumentError as error:
            faults.add(f"{place}[{index}]", error.message)


def record_message(record: Mapping[str, Any]) -> pb.TrainingRecord:
    """Returns the message of one record; raises InvalidArgumentError that names the field."""
    if not isinstance(record, Mapping):
        raise InvalidArgumentError(f"it is {type(record).__name__}; a record is a mapping")
    try:
        if "messages" in record:
            messages = [
                _calls.chat_message(message, f"messages[{index}]: ")
                for index, message in enumerate(record["messages"])
            ]
            for message in messages:
                _text({"content": message.content}, "content")
            return pb.TrainingRecord(chat=inference_pb2.Chat(messages=messages))
        if "prompt" in record or "completion" in record:
            pair = pb.PromptCompletion(
                prompt=_text(record, "prompt"), completion=_text(record, "completion"),
                prompt_pair=record.get("prompt_pair"),
            )  # fmt: skip
            return pb.TrainingRecord(pair=pair)
        if "score" in record:
            scored = pb.ScoredText(text=_text(record, "text"))
            fill(scored, score=_number(record, "score"), text_pair=record.get("text_pair"))
            return pb.TrainingRecord(scored=scored)
        if "label" in record:
            labelled = pb.LabelledText(text=_text(record, "text"), label=str(record["label"]))
            fill(labelled, text_pair=record.get("text_pair"))
            return pb.TrainingRecord(labelled=labelled)
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(f"a field has a wrong type: {error}") from None
    fields = ", ".join(map(str, record)) or "none"
    raise InvalidArgumentError(f"it has the fields {fields}; known are {_FORMS}")


def _text(record: Mapping[str, Any], name: str) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        found = type(value).__name__ if name in record else "missing"
        raise InvalidArgumentError(f"{name} is {found}; it has to be a text")
    if not value.strip():
        raise InvalidArgumentError(f"{name} is empty")
    return value


def _number(record: Mapping[str, Any], name: str) -> float:
    try:
        return float(record[name])  # tables hold texts
    except (TypeError, ValueError):
        raise InvalidArgumentError(f"{name} is {record[name]!r}, must be a number") from None


def _options(place: str, options: Mapping[str, Any]) -> pb.TrainingOptions:
    values: dict[str, Any] = {}
    for name, value in options.items():
        if name not in OPTION_FIELDS:
            near = nearest(str(name), OPTION_FIELDS)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(OPTION_FIELDS)}"
            raise InvalidArgumentError(f"{place}: unknown option {name!r}; {hint}")
        is_turns = name == "prompt_format" and isinstance(value, Mapping)
        values[name] = json.dumps(value) if is_turns else value
    message = pb.TrainingOptions()
    fill(message, place=f"{place}: ", **values)
    return message


def check_id(job_id: str) -> str:
    """Returns the id; raises InvalidArgumentError if it is no text."""
    if not isinstance(job_id, str):
        raise InvalidArgumentError(f"a job's id is a text, not {type(job_id).__name__}")
    return job_id


def cancel_request(job_id: str, adapters: Sequence[str]) -> pb.CancelJobRequest:
    """Returns the message that ends a job or some of its tasks."""
    if isinstance(adapters, str):
        raise InvalidArgumentError(f"adapters is a sequence of names; write [{adapters!r}]")
    return pb.CancelJobRequest(id=check_id(job_id), adapters=map(_calls.check_name, adapters))


def job(message: pb.Job) -> Job:
    """Returns the value of a job."""
    return Job(
        id=message.id,
        state=_state(_JOB_STATES, message.state),
        detail=message.detail,
        tasks=tuple(map(_job_task, message.tasks)),
        created_at=message.created_at.ToDatetime(tzinfo=UTC),
        started_at=_time(message.started_at) if message.HasField("started_at") else None,
        ended_at=_time(message.ended_at) if message.HasField("ended_at") else None,
        num_ahead=message.num_ahead,
    )


def event(message: pb.WatchJobResponse) -> JobEvent | None:
    """Returns the value of one message of a watched job, None for one of a newer server."""
    kind = message.WhichOneof("event")
    if kind == "job":
        return job(message.job)
    if kind == "step":
        step = message.step
        return TrainingStep(
            step.adapter, step.step, step.num_steps, step.loss, step.learning_rate,
            step.grad_norm, step.num_tokens,
        )  # fmt: skip
    return _evaluation(message.evaluation) if kind == "evaluation" else None


def _job_task(message: pb.JobTask) -> JobTask:
    return JobTask(
        adapter=message.adapter,
        state=_state(_TASK_STATES, message.state),
        detail=message.detail,
        step=message.step,
        num_steps=message.num_steps,
        loss=message.loss if message.HasField("loss") else None,
        best=_evaluation(message.best) if message.HasField("best") else None,
        num_tokens=message.num_tokens,
        num_examples=message.num_examples,
        num_held_out=message.num_held_out,
        digest=message.digest or None,
    )


def _evaluation(message: pb.TrainingEvaluation) -> TrainingEvaluation:
    accuracy = message.accuracy if message.HasField("accuracy") else None
    correlation = message.correlation if message.HasField("correlation") else None
    return TrainingEvaluation(
        message.adapter, message.step, message.loss, accuracy, message.is_best, correlation
    )


def _state(states: Mapping[int, _State], number: int) -> _State:
    try:
        return states[number]
    except KeyError:
        raise RedmuxError(
            f"a state is unknown to this client ({number}); a newer redmux may know it"
        ) from None


def _time(message: Timestamp) -> datetime:
    return message.ToDatetime(tzinfo=UTC)
