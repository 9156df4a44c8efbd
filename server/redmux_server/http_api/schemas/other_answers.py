"""Answers of all paths that generate nothing, for the document of the door."""

from typing import Any, Literal

from pydantic import Field

from redmux_server.http_api.schemas.answers import Answer, Applied, Usage

TEXT: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/plain": {"schema": {"type": "string"}}}}
}


class ModelTold(Answer):
    """What redmux tells of a model: of the base, or of an adapter."""

    base_fingerprint: str = ""
    digest: str = ""
    base_match: str = ""
    description: str = ""


class Model(Answer):
    """The base model, or an adapter whose parent it is."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int
    redmux: ModelTold


class Models(Answer):
    """The base model and the adapters."""

    object: Literal["list"]
    data: list[Model]


class ModelDeleted(Answer):
    """An adapter that is there no longer."""

    id: str
    object: Literal["model"]
    deleted: Literal[True]


class AdapterTold(Answer):
    """What is known of an adapter."""

    id: str
    object: Literal["adapter"]
    digest: str
    base_fingerprint: str
    base_match: str
    apply: str
    num_sites: int
    num_parameters: int
    size_bytes: int
    description: str
    created_at: int
    version: int
    aliases: dict[str, int]


class AdapterPut(AdapterTold):
    """An adapter that is there now; whether its name is new."""

    created_now: bool


class Adapters(Answer):
    """A page of adapters."""

    object: Literal["list"]
    data: list[AdapterTold]
    first_id: str | None
    last_id: str | None
    has_more: bool


class AdapterDeleted(Answer):
    """A name that is there no longer."""

    id: str
    object: Literal["adapter.deleted"]
    deleted: bool


class LoadedAdapters(Answer):
    """Digests by name, as SGLang tells them."""

    success: bool
    error_message: str
    loaded_adapters: dict[str, str]


class Stopped(Answer):
    """A stream that ends now."""

    id: str
    index: int
    stopped: Literal[True]


class Load(Answer):
    """What the engine computes now, and has computed since the start."""

    generates: bool
    running: int
    waiting: int
    max_running: int
    base_rows: int
    adapter_rows: list[int]
    kv_cache_used: float
    prefill_tokens: int
    decode_tokens: int


class Tokens(Answer):
    """The tokens of a prompt."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Text(Answer):
    """The text of tokens."""

    prompt: str


class ReadTold(Applied):
    """The adapter that was applied; of classes, what its head is and what it computed."""

    labels: list[str] = Field(default_factory=list)
    problem_type: str = ""
    logits: list[list[float]] = Field(default_factory=list)


class Read(Answer):
    """What is told of inputs that were read."""

    object: Literal["list"]
    model: str
    usage: Usage
    system_fingerprint: str
    redmux: ReadTold


class Embedding(Answer):
    """A vector: numbers, or base64 of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingList(Read):
    """A vector of each input."""

    data: list[Embedding]


class Pooled(Answer):
    """What was made of an input."""

    object: Literal["pooling"]
    index: int
    data: list[float] | str


class PooledList(Read):
    """Vectors of inputs as they are, or scores of classes."""

    id: str
    created: int
    data: list[Pooled]


class Classified(Answer):
    """The likeliest class of an input, and the probability of each."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class Classes(Read):
    """Classes of inputs."""

    id: str
    created: int
    data: list[Classified]


class Score(Answer):
    """How well two texts go together."""

    object: Literal["score"]
    index: int
    score: float


class Scores(Read):
    """A score of each pair."""

    id: str
    created: int
    data: list[Score]


class Status(Answer):
    """What state the server is in."""

    status: str


class Version(Answer):
    """The version of the server."""

    version: str
