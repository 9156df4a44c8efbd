"""What the client takes and returns: frozen values without any protobuf in them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, TypeAlias, TypedDict

FinishReason: TypeAlias = Literal["stop", "length"]
Health: TypeAlias = Literal["serving", "not_serving", "unknown"]

ModelKind: TypeAlias = Literal["decoder", "encoder", "encoder_decoder"]
Pooling: TypeAlias = Literal["mean", "cls", "last"]
ProblemType: TypeAlias = Literal["single_label", "multi_label", "regression"]

Prompt: TypeAlias = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""Raw text, token ids, or chat messages as in OpenAI's API.

A message has "role" and "content", a text or a list of text parts; an assistant's may have
"tool_calls", one of role "tool" has "tool_call_id", and each may have a "name".
"""

TextInput: TypeAlias = str | Sequence[int] | tuple[str, str]
"""A text, token ids, or two texts in one input."""


Continuation: TypeAlias = str | Sequence[int]
"""A text or token ids."""


class GenerationOptions(TypedDict, total=False):
    """Keyword arguments of `generate` and `stream`; what is left out, the server decides."""

    adapter: str | None
    """Name or digest of a loaded adapter; None is the bare base model."""
    max_tokens: int | None
    """Most tokens to generate; by default 256, or what the context leaves."""
    temperature: float | None
    """0 or None is greedy."""
    top_p: float | None
    top_k: int | None
    seed: int | None
    """Makes the draws repeatable, alone or in any batch."""
    stop: Sequence[str]
    """Texts that end the completion; they are not part of it."""
    stop_token_ids: Sequence[int]
    """Token ids that end the completion, beside the model's own end-of-text tokens."""
    ignore_eos: bool
    """Generates past the model's end-of-text tokens."""
    logprobs: bool
    """Returns the log-probability of each generated token."""
    parse_special_tokens: bool
    """Takes what is written like a special token in a chat message for that token."""
    template: str | None
    """Jinja template of the chat instead of the adapter's or the model's, if the server takes any."""
    template_args: Mapping[str, Any] | None
    """Further variables of the template, such as {"enable_thinking": False}."""
    add_generation_prompt: bool | None
    """Ends the chat with what begins an answer; by default unless the final message goes on."""
    continue_final_message: bool
    """Goes on with the content of the chat's final message."""
    tools: Sequence[Mapping[str, Any]] | None
    """Functions that the model may call, as in OpenAI's API."""
    tool_choice: str | Mapping[str, Any] | None
    """"auto" (default), "none", "required", or the name of the one function to call."""
    parallel_tool_calls: bool | None
    """Takes more than one call per completion; by default so."""


@dataclass(frozen=True, slots=True)
class Usage:
    """The tokens that a request took.

    `cached_prompt_tokens` of the prompt were computed by an earlier request already. What was
    found says nothing about the completion, so it does not count when two usages are compared.
    `added_special_tokens` of the prompt are those that the tokenizer puts before or around a text.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_prompt_tokens: int = field(default=0, compare=False)
    added_special_tokens: int = 0


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool, which may go into the "tool_calls" of the next prompt as it is.

    `arguments` is JSON, unless the model broke off or wrote something else.
    """

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A part of the call number `index`: the first has `id` and `name`, each may have arguments."""

    index: int
    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole completion.

    `logprobs` has one natural logarithm per token id, of the distribution before temperature, or
    is None where they were not asked for. `stop` is the stop text that ended it. `adapter` and
    `digest` name what it was computed with; both are None for the base model. `tool_calls` are not
    in `text`.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    finish_reason: FinishReason
    stop: str | None
    usage: Usage
    adapter: str | None
    digest: str | None
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a completion: what was decoded since the chunk before.

    The texts and tokens of all chunks, joined, are the completion. `text` may be empty while a
    character is incomplete. Only the last chunk has `finish_reason` and `usage`. `tool_calls` are
    parts of calls, which are not in `text`.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    adapter: str | None
    digest: str | None
    finish_reason: FinishReason | None
    stop: str | None
    usage: Usage | None
    tool_calls: tuple[ToolCallDelta, ...] = ()


@dataclass(frozen=True, slots=True)
class Classification:
    """What a head says of one input: a score and a logit per label.

    Scores are probabilities that sum to 1 (single label), a probability each (multi label), or the
    values themselves (regression).
    """

    labels: tuple[str, ...]
    scores: tuple[float, ...]
    logits: tuple[float, ...]

    @property
    def label(self) -> str:
        """The label with the highest score."""
        return max(zip(self.scores, self.labels, strict=True), key=lambda pair: pair[0])[1]


@dataclass(frozen=True, slots=True)
class Classifications:
    """A classification per input, and what they were computed with."""

    results: tuple[Classification, ...]
    labels: tuple[str, ...]
    problem_type: ProblemType
    usage: Usage
    adapter: str
    digest: str


@dataclass(frozen=True, slots=True)
class Embeddings:
    """A vector per input, and what they were computed with.

    `adapter` and `digest` are None for the base model.
    """

    vectors: tuple[tuple[float, ...], ...]
    usage: Usage
    adapter: str | None
    digest: str | None


@dataclass(frozen=True, slots=True)
class TokenScores:
    """How likely each of given tokens is after all those before it.

    `logprobs` are natural logarithms; `is_greedy` tells whether greedy decoding would have chosen
    the token.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    is_greedy: tuple[bool, ...]

    @property
    def logprob(self) -> float:
        """Log-probability of all these tokens together."""
        return math.fsum(self.logprobs)

    @property
    def all_greedy(self) -> bool:
        """Whether greedy decoding would have given exactly these tokens."""
        return all(self.is_greedy)


@dataclass(frozen=True, slots=True)
class Scores:
    """The scores of a prompt's continuations, in their order.

    `prompt` has those of the prompt without its first token, or is None where they were not asked
    for. `usage` counts the prompt once. `adapter` and `digest` are None for the base model.
    """

    continuations: tuple[TokenScores, ...]
    prompt: TokenScores | None
    usage: Usage
    adapter: str | None
    digest: str | None


@dataclass(frozen=True, slots=True)
class Adapter:
    """A published adapter. `size_bytes` is the size of its vectors in the server's memory.

    `base_match` is how the base that it was made for compares with the server's: "same",
    "quantized" (as near as two quantisations of one model are), "unverified" (an older file, of
    which only norms and biases can be compared), or "other" (a server that takes such adapters).
    """

    name: str
    digest: str
    base_fingerprint: str
    num_sites: int
    num_parameters: int
    size_bytes: int
    description: str
    created_at: datetime
    base_match: str


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What a server is, how it was set up and how busy it is.

    `choices` says why device, dtype, threads and kernels are what they are. `bit_identical` tells
    whether the start-up check found logits bit-identical alone and in mixed batches. `max_context`
    counts prompt and completion together; `max_running` and `max_batch_tokens` bound one forward
    pass. A decoder generates, scores and embeds, an encoder classifies and embeds, an
    encoder-decoder generates. `trains` tells whether training jobs are taken.
    """

    version: str
    model: str
    base_fingerprint: str
    architecture: str
    device: str
    dtype: str
    choices: tuple[str, ...]
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
    kind: ModelKind
    trains: bool


JobState: TypeAlias = Literal["queued", "running", "finished", "cancelled", "failed"]
TaskState: TypeAlias = Literal[
    "queued", "running", "completed", "stopped_early", "diverged", "cancelled", "failed"
]


class TrainingOptions(TypedDict, total=False):
    """How an adapter is trained; what is left out has the default of `redmux train`.

    docs/training.md explains each of them.
    """

    learning_rate: float
    head_learning_rate: float
    steps: int
    epochs: float
    batch_size: int
    schedule: Literal["linear", "cosine", "constant"]
    warmup: float
    warmup_steps: int
    weight_decay: float
    clip_norm: float
    label_smoothing: float
    sites: str
    layers: str
    train: Literal["both", "scale", "bias", "ln", "head"]
    eval_every: int
    patience: int
    metric: Literal["loss", "accuracy", "matthews", "pearson"]
    head: str
    seed: int
    valid_share: float
    """Share of the records that is held out where a task has no `valid`."""
    prompt_format: str | Mapping[str, Sequence[str]]
    """auto, template, chatml, raw, or turns such as {"user": [prefix, suffix], ...}."""
    max_length: int
    labels: Sequence[str]
    description: str
    license: str


@dataclass(frozen=True, slots=True)
class TrainingTask:
    """One adapter to train, and what from.

    A record is a mapping with the fields of a line of training data: prompt and completion, or
    messages for decoders; text and label, or text and score, for encoders. Without `valid`, a share
    of the records is held out.
    """

    adapter: str
    records: Sequence[Mapping[str, Any]]
    valid: Sequence[Mapping[str, Any]] = ()
    options: TrainingOptions = field(default_factory=TrainingOptions)


@dataclass(frozen=True, slots=True)
class TrainingStep:
    """One optimizer step of one adapter; `loss` is the mean over its batch, before the step."""

    adapter: str
    step: int
    num_steps: int
    loss: float
    learning_rate: float
    grad_norm: float
    num_tokens: int


@dataclass(frozen=True, slots=True)
class TrainingEvaluation:
    """One evaluation on held-out records; step 0 is the base model, `accuracy` None for scores.

    `correlation` is the task's metric where that is "matthews" or "pearson".
    """

    adapter: str
    step: int
    loss: float
    accuracy: float | None
    is_best: bool
    correlation: float | None = None


@dataclass(frozen=True, slots=True)
class JobTask:
    """How far one adapter of a job is.

    `loss` is that of the last step, `best` the best evaluation so far, `digest` that of the
    published adapter; each is None before there is one. `detail` says why it is no success.
    """

    adapter: str
    state: TaskState
    detail: str
    step: int
    num_steps: int
    loss: float | None
    best: TrainingEvaluation | None
    num_tokens: int
    num_examples: int
    num_held_out: int
    digest: str | None


@dataclass(frozen=True, slots=True)
class Job:
    """A training job as it stood. `num_ahead` jobs are probably trained before it."""

    id: str
    state: JobState
    detail: str
    tasks: tuple[JobTask, ...]
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    num_ahead: int

    @property
    def has_ended(self) -> bool:
        """Whether nothing about it will change any more."""
        return self.state not in ("queued", "running")

    @property
    def is_success(self) -> bool:
        """Whether every task has ended with a published adapter."""
        return all(task.state in ("completed", "stopped_early") for task in self.tasks)


JobEvent: TypeAlias = Job | TrainingStep | TrainingEvaluation
