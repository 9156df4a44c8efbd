"""What the client takes and returns: frozen values without any protobuf in them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, TypeAlias, TypedDict

FinishReason: TypeAlias = Literal["stop", "length"]
Pooling: TypeAlias = Literal["mean", "cls", "last"]
ProblemType: TypeAlias = Literal["single_label", "multi_label", "regression"]

Prompt: TypeAlias = str | Sequence[int] | Sequence[Mapping[str, str]]
"""Raw text, token ids, or chat messages with the keys "role" and "content"."""

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
class Completion:
    """A whole completion.

    `logprobs` has one natural logarithm per token id, of the distribution before temperature, or
    is None where they were not asked for. `stop` is the stop text that ended it. `adapter` and
    `digest` name what it was computed with; both are None for the base model.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    finish_reason: FinishReason
    stop: str | None
    usage: Usage
    adapter: str | None
    digest: str | None


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a completion: what was decoded since the chunk before.

    The texts and tokens of all chunks, joined, are the completion. `text` may be empty while a
    character is incomplete. Only the last chunk has `finish_reason` and `usage`.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    adapter: str | None
    digest: str | None
    finish_reason: FinishReason | None
    stop: str | None
    usage: Usage | None


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

    `adapter` and `digest` are None for the base model. `numpy.asarray` makes a matrix of them,
    [inputs, width] in float32, as they are on the wire.
    """

    vectors: tuple[tuple[float, ...], ...]
    usage: Usage
    adapter: str | None
    digest: str | None

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        import numpy  # whoever asks for an array has it

        if copy is False:
            raise ValueError("the vectors are no array yet, so a copy is made")
        return numpy.array(self.vectors, dtype=numpy.float32 if dtype is None else dtype)


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
