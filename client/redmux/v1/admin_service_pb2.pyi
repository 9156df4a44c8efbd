from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetServerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetServerInfoResponse(_message.Message):
    __slots__ = ("info",)
    INFO_FIELD_NUMBER: _ClassVar[int]
    info: ServerInfo
    def __init__(self, info: _Optional[_Union[ServerInfo, _Mapping]] = ...) -> None: ...

class ServerInfo(_message.Message):
    __slots__ = ("version", "model", "base_fingerprint", "architecture", "device", "dtype", "choices", "bit_identical", "vocab_size", "max_context", "max_running", "max_batch_tokens", "max_queue", "kv_cache_tokens", "num_adapters", "num_running", "num_waiting", "uptime_s", "kind", "trains", "load")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    BASE_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    BIT_IDENTICAL_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_FIELD_NUMBER: _ClassVar[int]
    MAX_RUNNING_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUE_FIELD_NUMBER: _ClassVar[int]
    KV_CACHE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    TRAINS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    version: str
    model: str
    base_fingerprint: str
    architecture: str
    device: str
    dtype: str
    choices: _containers.RepeatedScalarFieldContainer[str]
    bit_identical: bool
    vocab_size: int
    max_context: int
    max_running: int
    max_batch_tokens: int
    max_queue: int
    kv_cache_tokens: int
    num_adapters: int
    num_running: int
    num_waiting: int
    uptime_s: float
    kind: str
    trains: bool
    load: Load
    def __init__(self, version: _Optional[str] = ..., model: _Optional[str] = ..., base_fingerprint: _Optional[str] = ..., architecture: _Optional[str] = ..., device: _Optional[str] = ..., dtype: _Optional[str] = ..., choices: _Optional[_Iterable[str]] = ..., bit_identical: bool = ..., vocab_size: _Optional[int] = ..., max_context: _Optional[int] = ..., max_running: _Optional[int] = ..., max_batch_tokens: _Optional[int] = ..., max_queue: _Optional[int] = ..., kv_cache_tokens: _Optional[int] = ..., num_adapters: _Optional[int] = ..., num_running: _Optional[int] = ..., num_waiting: _Optional[int] = ..., uptime_s: _Optional[float] = ..., kind: _Optional[str] = ..., trains: bool = ..., load: _Optional[_Union[Load, _Mapping]] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("num_prompt_tokens", "num_completion_tokens", "num_cached_tokens", "num_ended", "num_refused", "num_running_adapters", "kv_cache_used", "first_token", "between_tokens", "whole_request")
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_ENDED_FIELD_NUMBER: _ClassVar[int]
    NUM_REFUSED_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    KV_CACHE_USED_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    BETWEEN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    WHOLE_REQUEST_FIELD_NUMBER: _ClassVar[int]
    num_prompt_tokens: int
    num_completion_tokens: int
    num_cached_tokens: int
    num_ended: int
    num_refused: int
    num_running_adapters: int
    kv_cache_used: float
    first_token: Latencies
    between_tokens: Latencies
    whole_request: Latencies
    def __init__(self, num_prompt_tokens: _Optional[int] = ..., num_completion_tokens: _Optional[int] = ..., num_cached_tokens: _Optional[int] = ..., num_ended: _Optional[int] = ..., num_refused: _Optional[int] = ..., num_running_adapters: _Optional[int] = ..., kv_cache_used: _Optional[float] = ..., first_token: _Optional[_Union[Latencies, _Mapping]] = ..., between_tokens: _Optional[_Union[Latencies, _Mapping]] = ..., whole_request: _Optional[_Union[Latencies, _Mapping]] = ...) -> None: ...

class Latencies(_message.Message):
    __slots__ = ("limits_s", "counts", "sum_s")
    LIMITS_S_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    SUM_S_FIELD_NUMBER: _ClassVar[int]
    limits_s: _containers.RepeatedScalarFieldContainer[float]
    counts: _containers.RepeatedScalarFieldContainer[int]
    sum_s: float
    def __init__(self, limits_s: _Optional[_Iterable[float]] = ..., counts: _Optional[_Iterable[int]] = ..., sum_s: _Optional[float] = ...) -> None: ...
