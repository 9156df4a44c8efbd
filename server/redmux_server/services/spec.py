"""What callers ask for, as it came in at any door; None is unset."""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from redmux.mixes import Mix
from redmux_server.registry.published import Published

Message = Mapping[str, Any]  # as in OpenAI's chats: "role", "content" and what goes with them


@dataclass(frozen=True, slots=True)
class Chat:
    """A prompt of messages, not yet rendered.

    With `parse_special`, special tokens that are written out in contents are these tokens. It may
    not have both `add_generation_prompt` and `continue_final_message`.
    """

    messages: Sequence[Message]
    parse_special: bool = False
    template: str | None = None  # instead of the adapter's format and the model's template
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    template_args: Mapping[str, Any] = field(default_factory=dict)
    tools: Sequence[Mapping[str, Any]] = ()  # in OpenAI's form: {"type": "function", "function"}
    tool_choice: str = "auto"  # "none", "auto", "required", or the name of a function
    parallel_tool_calls: bool = True  # whether there may be several in one completion


Prompt = str | Sequence[int] | Chat
# A name, a digest, or "" for the base model; what either was resolved to; or several as one.
AdapterRef = str | Published | Mix


@dataclass(frozen=True, slots=True)
class TextPair:
    """Two texts that are one input."""

    first: str
    second: str


ReadInput = str | Sequence[int] | TextPair


class GrammarKind(enum.Enum):
    """The language that a grammar is written in."""

    JSON_SCHEMA = "json_schema"
    JSON_OBJECT = "json_object"  # any JSON object; `source` is empty
    REGEX = "regex"
    CHOICE = "choice"  # `source` is a JSON list of texts
    LARK = "lark"


@dataclass(frozen=True, slots=True)
class Grammar:
    """What a completion has to look like."""

    kind: GrammarKind
    source: str = ""


@dataclass(frozen=True, slots=True)
class GenerationSpec:
    """What a caller wants generated."""

    prompt: Prompt
    adapter: AdapterRef = ""
    apply: str | None = None  # which tokens the adapter edits, instead of what it says itself
    # Sampling.
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram: int | None = None  # length of the n-grams
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: Sequence[int] = ()  # none allows every one
    bad_words: Sequence[str] = ()
    bad_token_ids: Sequence[int] = ()
    n: int | None = None  # choices
    seed: int | None = None
    # Stopping.
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    stop_regex: str | None = None
    ignore_eos: bool = False
    # Outputs.
    logprobs: bool = False
    top_logprobs: int | None = None  # alternatives of each generated token
    prompt_logprobs: int | None = None  # alternatives of each prompt token; 0 is the token alone
    include_stop_str: bool = False
    skip_special_tokens: bool = True
    grammar: Grammar | None = None
    # Scheduling.
    priority: int | None = None  # within the tenant: lower is sooner
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class TokenizeSpec:
    """What a caller wants the tokens of."""

    prompt: str | Chat
    adapter: AdapterRef = ""
    add_special_tokens: bool | None = None  # False leaves out what is put before a text


@dataclass(frozen=True, slots=True)
class ScoreSpec:
    """What a caller wants scored."""

    prompt: Prompt
    continuations: Sequence[str | Sequence[int]]
    adapter: AdapterRef = ""
    prompt_logprobs: bool = False
    apply: str | None = None  # as in GenerationSpec
