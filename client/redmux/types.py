"""What the client takes and returns: frozen values without any protobuf in them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, Protocol, TypeAlias, TypedDict

from redmux.mixes import Mix

FinishReason: TypeAlias = Literal["stop", "length"]
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


class HasJsonSchema(Protocol):
    """What tells its JSON schema, such as the classes of pydantic's models."""

    def model_json_schema(self) -> dict[str, Any]:
        """Returns the JSON schema."""
        ...


class ChatOptions(TypedDict, total=False):
    """Keyword arguments that say how chat messages become a prompt."""

    parse_special_tokens: bool
    """Takes what is written like a special token in a chat message for that token."""
    template: str | None
    """Jinja template instead of the adapter's or the model's, where the server takes any."""
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


class GenerationOptions(ChatOptions, total=False):
    """Keyword arguments of `generate` and `stream`; what is left out, the server decides."""

    adapter: str | Mix | None
    """Name or digest of a loaded adapter, or a mix of some; None is the bare base model."""
    max_tokens: int | None
    """Most tokens to generate; by default what the context leaves."""
    min_tokens: int | None
    """Fewest tokens to generate; until then nothing ends the completion."""
    n: int | None
    """Choices to generate, 1 to 64; the others than the first are `Completion.other_choices`."""
    temperature: float | None
    """0 or None is greedy."""
    top_p: float | None
    """Draws from the smallest set of tokens whose probability reaches this."""
    top_k: int | None
    """Draws from so many of the likeliest tokens; 0 does not restrict."""
    min_p: float | None
    """Draws from tokens at least this share as likely as the likeliest."""
    typical_p: float | None
    """Draws from the most typical tokens whose probability reaches this."""
    presence_penalty: float | None
    """Taken from the logit of what is in the completion already, -2 to 2."""
    frequency_penalty: float | None
    """The same, for each time that it is there."""
    repetition_penalty: float | None
    """Makes what is in prompt or completion less likely above 1, more likely below."""
    no_repeat_ngram: int | None
    """No sequence of so many tokens comes twice in prompt and completion."""
    logit_bias: Mapping[int, float]
    """Added to the logits of token ids, -100 to 100."""
    allowed_token_ids: Sequence[int]
    """All other tokens are banned; none allows all."""
    bad_words: Sequence[str]
    """Words that must not be in the completion."""
    bad_token_ids: Sequence[int]
    """Token ids that are never generated."""
    seed: int | None
    """Makes the draws repeatable, alone or in any batch."""
    stop: Sequence[str]
    """Texts that end the completion; they are not part of it, unless `include_stop_str`."""
    stop_regex: str | None
    """A regular expression of RE2 that ends the completion where it first matches."""
    include_stop_str: bool
    """Keeps what ended the completion in its text."""
    stop_token_ids: Sequence[int]
    """Token ids that end the completion, beside the model's own end-of-text tokens."""
    ignore_eos: bool
    """Generates past the model's end-of-text tokens."""
    logprobs: bool
    """Returns the log-probability of each generated token."""
    schema: Mapping[str, Any] | str | HasJsonSchema | None
    """JSON schema of the completion: a mapping, its JSON text, or a pydantic model."""
    json_object: bool
    """Makes the completion a JSON object, any one."""
    regex: str | None
    """Regular expression that the whole completion matches."""
    choices: Sequence[str] | None
    """Texts of which the completion is one."""
    grammar: str | None
    """Lark grammar of the completion."""
    top_logprobs: int | None
    """With `logprobs`: how many of the likeliest tokens to return at each place, 0 to 20."""
    prompt_logprobs: int | None
    """Returns those of the prompt too, each with so many of the likeliest tokens, 0 to 20."""
    skip_special_tokens: bool
    """False gives special tokens that are generated their text."""
    apply: str | None
    """What the adapter edits: all, prompt, generation or after:TEXT; by default what it says."""
    priority: int | None
    """Which of your waiting requests goes first: the lowest, -100 to 100; by default 0."""


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


TopLogprobs: TypeAlias = tuple[tuple[int, float], ...]
"""The likeliest tokens at one place, likeliest first: (token id, log-probability)."""


@dataclass(frozen=True, slots=True)
class PromptScores:
    """Of each token of a prompt but the first, which follows nothing, how likely it is there.

    `top_logprobs` is empty where none were asked for.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    top_logprobs: tuple[TopLogprobs, ...] = ()


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

    `logprobs` has one natural logarithm per token id, of the model's own distribution before
    biases, penalties, bans and temperature, or is None where they were not asked for, as
    `top_logprobs` is. `stop` is the text that ended it, `stop_token_id` the token. `adapter` and
    `digest` name what it was computed with; both are None for the base model. `tool_calls` are not
    in `text`.

    `first_token_s` and `total_s` are the server's: seconds since the request came. They do not
    count when two completions are compared. `other_choices` are those behind the first of `n`;
    the prompt is counted in the usage of each.
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
    top_logprobs: tuple[TopLogprobs, ...] | None = None
    stop_token_id: int | None = None
    prompt: PromptScores | None = None
    first_token_s: float | None = field(default=None, compare=False)
    total_s: float | None = field(default=None, compare=False)
    other_choices: "tuple[Completion, ...]" = ()

    @property
    def choices(self) -> "tuple[Completion, ...]":
        """This completion and the others of the same prompt."""
        return (self, *self.other_choices)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a completion: what was decoded since the chunk before.

    The texts and tokens of all chunks of one `index`, joined, are that choice. `text` may be empty
    while a character is incomplete. Only the last chunk of a choice has `finish_reason` and
    `usage`, only the first of all has `prompt`. `tool_calls` are parts of calls, which
    are not in `text`.
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
    index: int = 0
    top_logprobs: tuple[TopLogprobs, ...] | None = None
    stop_token_id: int | None = None
    prompt: PromptScores | None = None
    first_token_s: float | None = field(default=None, compare=False)
    total_s: float | None = field(default=None, compare=False)


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
class Tokens:
    """The tokens of a prompt, `added_special_tokens` of them put there by the server.

    `token_texts` has the text of each, in which a part of a character is U+FFFD, or is None where
    they were not asked for. `max_context` is the most tokens of a prompt and its completion
    together. `adapter` and `digest` are None for the base model.
    """

    token_ids: tuple[int, ...]
    token_texts: tuple[str, ...] | None
    added_special_tokens: int
    max_context: int
    adapter: str | None
    digest: str | None


@dataclass(frozen=True, slots=True)
class AdapterAlias:
    """A name for a version of an adapter, `NAME@ALIAS`, until it is moved to another one."""

    name: str
    version: int


@dataclass(frozen=True, slots=True)
class Adapter:
    """A published adapter. `size_bytes` is the size of its vectors in the server's memory.

    `version` counts what was put under the name, from 1; 0 is what the server was given at start or
    has in a folder of files. `aliases` are all of the name's, whatever version they point at.

    `base_match` is how the base that it was made for compares with the server's: "same",
    "quantized" (as near as two quantisations of one model are), "unverified" (an older file, of
    which only norms and biases can be compared), or "other" (a server that takes such adapters).
    `apply` is which tokens it edits, as in `GenerationOptions`.
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
    apply: str
    version: int = 0
    aliases: tuple[AdapterAlias, ...] = ()
