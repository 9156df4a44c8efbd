"""Client SDK of redmux, which serves many RED adapters from one resident base model."""

from redmux import _quiet  # noqa: F401  # before anything else imports gRPC
from redmux.aio import AsyncAdapters, AsyncClient
from redmux.client import Adapters, Client
from redmux.errors import (
    AbortedError,
    AlreadyExistsError,
    DataLossError,
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidAdapterError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    RedmuxError,
    RequestCancelledError,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnavailableError,
    UnimplementedError,
    WrongBaseError,
)
from redmux.job_types import (
    Job,
    JobEvent,
    JobState,
    JobTask,
    TaskState,
    TrainingEvaluation,
    TrainingOptions,
    TrainingStep,
    TrainingTask,
)
from redmux.mixes import Mix, MixPart
from redmux.server_types import Health, Latencies, Load, ModelKind, ServerInfo
from redmux.training import AsyncJobs, Jobs
from redmux.types import (
    Adapter,
    Chunk,
    Classification,
    Classifications,
    Completion,
    Continuation,
    Embeddings,
    FinishReason,
    GenerationOptions,
    Pooling,
    ProblemType,
    Prompt,
    PromptScores,
    Scores,
    TextInput,
    TokenScores,
    ToolCall,
    ToolCallDelta,
    TopLogprobs,
    Usage,
)

__version__ = "0.1.0"

__all__ = [
    "AbortedError",
    "Adapter",
    "Adapters",
    "AlreadyExistsError",
    "AsyncAdapters",
    "AsyncClient",
    "AsyncJobs",
    "Chunk",
    "Classification",
    "Classifications",
    "Client",
    "Completion",
    "Continuation",
    "DataLossError",
    "DeadlineExceededError",
    "Embeddings",
    "FailedPreconditionError",
    "FinishReason",
    "GenerationOptions",
    "Health",
    "InvalidAdapterError",
    "InvalidArgumentError",
    "Job",
    "JobEvent",
    "JobState",
    "JobTask",
    "Jobs",
    "Latencies",
    "Load",
    "Mix",
    "MixPart",
    "ModelKind",
    "NotFoundError",
    "PermissionDeniedError",
    "Pooling",
    "ProblemType",
    "Prompt",
    "PromptScores",
    "RedmuxError",
    "RequestCancelledError",
    "ResourceExhaustedError",
    "Scores",
    "ServerInfo",
    "TaskState",
    "TextInput",
    "TokenScores",
    "ToolCall",
    "ToolCallDelta",
    "TopLogprobs",
    "TrainingEvaluation",
    "TrainingOptions",
    "TrainingStep",
    "TrainingTask",
    "UnauthenticatedError",
    "UnavailableError",
    "UnimplementedError",
    "Usage",
    "WrongBaseError",
    "__version__",
]

# So that tracebacks and pickles name what users import; type aliases are no classes of ours.
for _name in __all__:
    if isinstance(globals()[_name], type):
        globals()[_name].__module__ = "redmux"
del _name
