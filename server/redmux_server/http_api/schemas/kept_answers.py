"""Answers about what is kept for a caller: files, fine-tuning jobs, batches."""

from typing import Any, Literal

from redmux_server.http_api.schemas.answers import Answer

CONTENT: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    }
}


class Page(Answer):
    """A page of a list."""

    object: Literal["list"]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileTold(Answer):
    """What is known of a file."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["processed"]
    status_details: None
    expires_at: None


class Files(Page):
    """A page of files."""

    data: list[FileTold]


class FileDeleted(Answer):
    """A file that is there no longer."""

    id: str
    object: Literal["file"]
    deleted: Literal[True]


class HyperparametersTold(Answer):
    """How long and how fast it is learned; "auto" until the data is known."""

    n_epochs: int | Literal["auto"]
    batch_size: int | Literal["auto"]
    learning_rate_multiplier: float | Literal["auto"]


class SupervisedTold(Answer):
    """What was chosen for learning from examples."""

    hyperparameters: HyperparametersTold


class MethodTold(Answer):
    """How it is learned."""

    type: Literal["supervised"]
    supervised: SupervisedTold


class JobError(Answer):
    """Why a job has failed."""

    code: str
    message: str
    param: str | None


class FineTuningJob(Answer):
    """A job, and how far it is."""

    id: str
    object: Literal["fine_tuning.job"]
    model: str
    created_at: int
    finished_at: int | None
    fine_tuned_model: str | None
    organization_id: str
    result_files: list[str]
    status: Literal["validating_files", "queued", "running", "succeeded", "failed", "cancelled"]
    validation_file: str | None
    training_file: str
    hyperparameters: HyperparametersTold
    trained_tokens: int | None
    error: JobError | None
    user_provided_suffix: str | None
    seed: int
    estimated_finish: None
    integrations: list[Any]
    metadata: dict[str, str] | None
    method: MethodTold


class FineTuningJobs(Page):
    """A page of jobs."""

    data: list[FineTuningJob]


class JobEvent(Answer):
    """Something that has happened to a job; `data` are the figures of a step."""

    id: str
    object: Literal["fine_tuning.job.event"]
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any]


class JobEvents(Page):
    """A page of events."""

    data: list[JobEvent]


class CheckpointMetrics(Answer):
    """The figures of a checkpoint's step, as far as there are any."""

    step: int
    train_loss: float | None
    full_valid_loss: float | None
    full_valid_mean_token_accuracy: float | None


class Checkpoint(Answer):
    """An adapter that a job has made."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"]
    created_at: int
    step_number: int
    metrics: CheckpointMetrics
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str


class Checkpoints(Page):
    """A page of checkpoints."""

    data: list[Checkpoint]


class BatchFault(Answer):
    """What is wrong with a line of the input file, or with all of it."""

    code: str
    message: str
    line: int | None
    param: str | None


class BatchFaults(Answer):
    """The first faults of the input file."""

    object: Literal["list"]
    data: list[BatchFault]


class RequestCounts(Answer):
    """How many lines there are, and have which answer."""

    total: int
    completed: int
    failed: int


class CachedTokens(Answer):
    """Tokens of prompts that were there already."""

    cached_tokens: int


class ReasoningTokens(Answer):
    """None are counted."""

    reasoning_tokens: int


class BatchUsage(Answer):
    """The tokens of all answers."""

    input_tokens: int
    input_tokens_details: CachedTokens
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int


class BatchTold(Answer):
    """A batch, and how far it is."""

    id: str
    object: Literal["batch"]
    endpoint: str
    errors: BatchFaults | None
    input_file_id: str
    completion_window: str
    status: Literal[
        "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling",
        "cancelled",
    ]  # fmt: skip
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    expires_at: int
    in_progress_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    usage: BatchUsage
    metadata: dict[str, str] | None


class Batches(Page):
    """A page of batches."""

    data: list[BatchTold]
