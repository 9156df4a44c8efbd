from google.protobuf import timestamp_pb2 as _timestamp_pb2
from redmux.v1 import inference_service_pb2 as _inference_service_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class JobState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    JOB_STATE_UNSPECIFIED: _ClassVar[JobState]
    JOB_STATE_QUEUED: _ClassVar[JobState]
    JOB_STATE_RUNNING: _ClassVar[JobState]
    JOB_STATE_FINISHED: _ClassVar[JobState]
    JOB_STATE_CANCELLED: _ClassVar[JobState]
    JOB_STATE_FAILED: _ClassVar[JobState]

class TaskState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TASK_STATE_UNSPECIFIED: _ClassVar[TaskState]
    TASK_STATE_QUEUED: _ClassVar[TaskState]
    TASK_STATE_RUNNING: _ClassVar[TaskState]
    TASK_STATE_COMPLETED: _ClassVar[TaskState]
    TASK_STATE_STOPPED_EARLY: _ClassVar[TaskState]
    TASK_STATE_DIVERGED: _ClassVar[TaskState]
    TASK_STATE_CANCELLED: _ClassVar[TaskState]
    TASK_STATE_FAILED: _ClassVar[TaskState]
JOB_STATE_UNSPECIFIED: JobState
JOB_STATE_QUEUED: JobState
JOB_STATE_RUNNING: JobState
JOB_STATE_FINISHED: JobState
JOB_STATE_CANCELLED: JobState
JOB_STATE_FAILED: JobState
TASK_STATE_UNSPECIFIED: TaskState
TASK_STATE_QUEUED: TaskState
TASK_STATE_RUNNING: TaskState
TASK_STATE_COMPLETED: TaskState
TASK_STATE_STOPPED_EARLY: TaskState
TASK_STATE_DIVERGED: TaskState
TASK_STATE_CANCELLED: TaskState
TASK_STATE_FAILED: TaskState

class TrainingTask(_message.Message):
    __slots__ = ("adapter", "records", "valid", "options")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    VALID_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    adapter: str
    records: _containers.RepeatedCompositeFieldContainer[TrainingRecord]
    valid: _containers.RepeatedCompositeFieldContainer[TrainingRecord]
    options: TrainingOptions
    def __init__(self, adapter: _Optional[str] = ..., records: _Optional[_Iterable[_Union[TrainingRecord, _Mapping]]] = ..., valid: _Optional[_Iterable[_Union[TrainingRecord, _Mapping]]] = ..., options: _Optional[_Union[TrainingOptions, _Mapping]] = ...) -> None: ...

class TrainingRecord(_message.Message):
    __slots__ = ("pair", "chat", "labelled", "scored")
    PAIR_FIELD_NUMBER: _ClassVar[int]
    CHAT_FIELD_NUMBER: _ClassVar[int]
    LABELLED_FIELD_NUMBER: _ClassVar[int]
    SCORED_FIELD_NUMBER: _ClassVar[int]
    pair: PromptCompletion
    chat: _inference_service_pb2.Chat
    labelled: LabelledText
    scored: ScoredText
    def __init__(self, pair: _Optional[_Union[PromptCompletion, _Mapping]] = ..., chat: _Optional[_Union[_inference_service_pb2.Chat, _Mapping]] = ..., labelled: _Optional[_Union[LabelledText, _Mapping]] = ..., scored: _Optional[_Union[ScoredText, _Mapping]] = ...) -> None: ...

class PromptCompletion(_message.Message):
    __slots__ = ("prompt", "completion", "prompt_pair")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_FIELD_NUMBER: _ClassVar[int]
    PROMPT_PAIR_FIELD_NUMBER: _ClassVar[int]
    prompt: str
    completion: str
    prompt_pair: str
    def __init__(self, prompt: _Optional[str] = ..., completion: _Optional[str] = ..., prompt_pair: _Optional[str] = ...) -> None: ...

class LabelledText(_message.Message):
    __slots__ = ("text", "label", "text_pair")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    TEXT_PAIR_FIELD_NUMBER: _ClassVar[int]
    text: str
    label: str
    text_pair: str
    def __init__(self, text: _Optional[str] = ..., label: _Optional[str] = ..., text_pair: _Optional[str] = ...) -> None: ...

class ScoredText(_message.Message):
    __slots__ = ("text", "score", "text_pair")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    TEXT_PAIR_FIELD_NUMBER: _ClassVar[int]
    text: str
    score: float
    text_pair: str
    def __init__(self, text: _Optional[str] = ..., score: _Optional[float] = ..., text_pair: _Optional[str] = ...) -> None: ...

class TrainingOptions(_message.Message):
    __slots__ = ("learning_rate", "head_learning_rate", "steps", "epochs", "batch_size", "schedule", "warmup", "weight_decay", "clip_norm", "label_smoothing", "sites", "layers", "train", "eval_every", "patience", "metric", "head", "seed", "valid_share", "prompt_format", "max_length", "labels", "description", "license", "warmup_steps", "apply")
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    HEAD_LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    EPOCHS_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    SCHEDULE_FIELD_NUMBER: _ClassVar[int]
    WARMUP_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DECAY_FIELD_NUMBER: _ClassVar[int]
    CLIP_NORM_FIELD_NUMBER: _ClassVar[int]
    LABEL_SMOOTHING_FIELD_NUMBER: _ClassVar[int]
    SITES_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    TRAIN_FIELD_NUMBER: _ClassVar[int]
    EVAL_EVERY_FIELD_NUMBER: _ClassVar[int]
    PATIENCE_FIELD_NUMBER: _ClassVar[int]
    METRIC_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    VALID_SHARE_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FORMAT_FIELD_NUMBER: _ClassVar[int]
    MAX_LENGTH_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    LICENSE_FIELD_NUMBER: _ClassVar[int]
    WARMUP_STEPS_FIELD_NUMBER: _ClassVar[int]
    APPLY_FIELD_NUMBER: _ClassVar[int]
    learning_rate: float
    head_learning_rate: float
    steps: int
    epochs: float
    batch_size: int
    schedule: str
    warmup: float
    weight_decay: float
    clip_norm: float
    label_smoothing: float
    sites: str
    layers: str
    train: str
    eval_every: int
    patience: int
    metric: str
    head: str
    seed: int
    valid_share: float
    prompt_format: str
    max_length: int
    labels: _containers.RepeatedScalarFieldContainer[str]
    description: str
    license: str
    warmup_steps: int
    apply: str
    def __init__(self, learning_rate: _Optional[float] = ..., head_learning_rate: _Optional[float] = ..., steps: _Optional[int] = ..., epochs: _Optional[float] = ..., batch_size: _Optional[int] = ..., schedule: _Optional[str] = ..., warmup: _Optional[float] = ..., weight_decay: _Optional[float] = ..., clip_norm: _Optional[float] = ..., label_smoothing: _Optional[float] = ..., sites: _Optional[str] = ..., layers: _Optional[str] = ..., train: _Optional[str] = ..., eval_every: _Optional[int] = ..., patience: _Optional[int] = ..., metric: _Optional[str] = ..., head: _Optional[str] = ..., seed: _Optional[int] = ..., valid_share: _Optional[float] = ..., prompt_format: _Optional[str] = ..., max_length: _Optional[int] = ..., labels: _Optional[_Iterable[str]] = ..., description: _Optional[str] = ..., license: _Optional[str] = ..., warmup_steps: _Optional[int] = ..., apply: _Optional[str] = ...) -> None: ...

class Job(_message.Message):
    __slots__ = ("id", "state", "detail", "tasks", "created_at", "started_at", "ended_at", "num_ahead")
    ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    STARTED_AT_FIELD_NUMBER: _ClassVar[int]
    ENDED_AT_FIELD_NUMBER: _ClassVar[int]
    NUM_AHEAD_FIELD_NUMBER: _ClassVar[int]
    id: str
    state: JobState
    detail: str
    tasks: _containers.RepeatedCompositeFieldContainer[JobTask]
    created_at: _timestamp_pb2.Timestamp
    started_at: _timestamp_pb2.Timestamp
    ended_at: _timestamp_pb2.Timestamp
    num_ahead: int
    def __init__(self, id: _Optional[str] = ..., state: _Optional[_Union[JobState, str]] = ..., detail: _Optional[str] = ..., tasks: _Optional[_Iterable[_Union[JobTask, _Mapping]]] = ..., created_at: _Optional[_Union[_timestamp_pb2.Timestamp, _Mapping]] = ..., started_at: _Optional[_Union[_timestamp_pb2.Timestamp, _Mapping]] = ..., ended_at: _Optional[_Union[_timestamp_pb2.Timestamp, _Mapping]] = ..., num_ahead: _Optional[int] = ...) -> None: ...

class JobTask(_message.Message):
    __slots__ = ("adapter", "state", "detail", "step", "num_steps", "loss", "best", "num_tokens", "num_examples", "num_held_out", "digest")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    BEST_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    NUM_HELD_OUT_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    adapter: str
    state: TaskState
    detail: str
    step: int
    num_steps: int
    loss: float
    best: TrainingEvaluation
    num_tokens: int
    num_examples: int
    num_held_out: int
    digest: str
    def __init__(self, adapter: _Optional[str] = ..., state: _Optional[_Union[TaskState, str]] = ..., detail: _Optional[str] = ..., step: _Optional[int] = ..., num_steps: _Optional[int] = ..., loss: _Optional[float] = ..., best: _Optional[_Union[TrainingEvaluation, _Mapping]] = ..., num_tokens: _Optional[int] = ..., num_examples: _Optional[int] = ..., num_held_out: _Optional[int] = ..., digest: _Optional[str] = ...) -> None: ...

class TrainingStep(_message.Message):
    __slots__ = ("adapter", "step", "num_steps", "loss", "learning_rate", "grad_norm", "num_tokens")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    GRAD_NORM_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    adapter: str
    step: int
    num_steps: int
    loss: float
    learning_rate: float
    grad_norm: float
    num_tokens: int
    def __init__(self, adapter: _Optional[str] = ..., step: _Optional[int] = ..., num_steps: _Optional[int] = ..., loss: _Optional[float] = ..., learning_rate: _Optional[float] = ..., grad_norm: _Optional[float] = ..., num_tokens: _Optional[int] = ...) -> None: ...

class TrainingEvaluation(_message.Message):
    __slots__ = ("adapter", "step", "loss", "accuracy", "is_best", "correlation")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    ACCURACY_FIELD_NUMBER: _ClassVar[int]
    IS_BEST_FIELD_NUMBER: _ClassVar[int]
    CORRELATION_FIELD_NUMBER: _ClassVar[int]
    adapter: str
    step: int
    loss: float
    accuracy: float
    is_best: bool
    correlation: float
    def __init__(self, adapter: _Optional[str] = ..., step: _Optional[int] = ..., loss: _Optional[float] = ..., accuracy: _Optional[float] = ..., is_best: bool = ..., correlation: _Optional[float] = ...) -> None: ...

class CreateJobRequest(_message.Message):
    __slots__ = ("tasks", "replace", "request_id")
    TASKS_FIELD_NUMBER: _ClassVar[int]
    REPLACE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    tasks: _containers.RepeatedCompositeFieldContainer[TrainingTask]
    replace: bool
    request_id: str
    def __init__(self, tasks: _Optional[_Iterable[_Union[TrainingTask, _Mapping]]] = ..., replace: bool = ..., request_id: _Optional[str] = ...) -> None: ...

class CreateJobResponse(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: Job
    def __init__(self, job: _Optional[_Union[Job, _Mapping]] = ...) -> None: ...

class GetJobRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class GetJobResponse(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: Job
    def __init__(self, job: _Optional[_Union[Job, _Mapping]] = ...) -> None: ...

class ListJobsRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListJobsResponse(_message.Message):
    __slots__ = ("jobs", "next_page_token")
    JOBS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    jobs: _containers.RepeatedCompositeFieldContainer[Job]
    next_page_token: str
    def __init__(self, jobs: _Optional[_Iterable[_Union[Job, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class WatchJobRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class WatchJobResponse(_message.Message):
    __slots__ = ("job", "step", "evaluation")
    JOB_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    EVALUATION_FIELD_NUMBER: _ClassVar[int]
    job: Job
    step: TrainingStep
    evaluation: TrainingEvaluation
    def __init__(self, job: _Optional[_Union[Job, _Mapping]] = ..., step: _Optional[_Union[TrainingStep, _Mapping]] = ..., evaluation: _Optional[_Union[TrainingEvaluation, _Mapping]] = ...) -> None: ...

class CancelJobRequest(_message.Message):
    __slots__ = ("id", "adapters")
    ID_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    id: str
    adapters: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, id: _Optional[str] = ..., adapters: _Optional[_Iterable[str]] = ...) -> None: ...

class CancelJobResponse(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: Job
    def __init__(self, job: _Optional[_Union[Job, _Mapping]] = ...) -> None: ...
