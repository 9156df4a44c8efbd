"""Check what a caller asks for, before anything is queued. The one validator for every door."""

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from redmux.errors import InvalidArgumentError
from redmux_adapters import PromptFormat
from redmux_server.engine.request import SamplingParams
from redmux_server.engine.stop_pattern import StopPattern
from redmux_server.models.text import MAX_BYTES_PER_TOKEN
from redmux_server.models.too_long import TooLongError
from redmux_server.services.chat import check_chat
from redmux_server.services.grammar_source import MAX_BYTES as MAX_GRAMMAR_BYTES
from redmux_server.services.spec import (
    Chat,
    GenerationSpec,
    Prompt,
    ReadInput,
    ScoreSpec,
    TextPair,
)

MAX_STOPS = 16
MAX_STOP_BYTES = 128
MAX_STOP_TOKEN_IDS = 64
MAX_TEMPERATURE = 100.0
REPETITION_PENALTIES = (0.01, 100.0)
MAX_BIASES = 1024
MAX_BIAS = 100.0
MAX_BAD_TOKEN_IDS = 1024
MAX_BAD_WORDS = 128
MAX_BAD_WORD_BYTES = 128
MAX_CHOICES = 64
MAX_TOP = 20  # likeliest tokens that are told of
MAX_PRIORITY = 100
MAX_CONTINUATIONS = 128
MAX_SCORED_TOKENS = 300_000  # of all continuations; up to ten bytes each in the answer


def check_num_biases(number: int) -> None:
    """Raises InvalidArgumentError for more tokens than logit_bias may have."""
    if number > MAX_BIASES:
        raise InvalidArgumentError(f"logit_bias has {number} tokens; limit {MAX_BIASES}")


@dataclass(frozen=True, slots=True)
class Validator:
    """The limits of the served model; every method raises InvalidArgumentError.

    Lists are counted before they are walked: they may be those of a message, as long as it.
    """

    vocab_size: int
    max_context: int
    allow_request_template: bool = False
    max_prompt_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_prompt_bytes", MAX_BYTES_PER_TOKEN * self.max_context)

    def prompt(
        self, prompt: Prompt, prompt_format: PromptFormat | None = None, name: str = "prompt"
    ) -> None:
        """Checks a prompt, or what is called `name`, before it is tokenized.

        A chat is counted with what its format adds to it.
        """
        if isinstance(prompt, str):
            num_bytes = _num_bytes(prompt)
        elif isinstance(prompt, Chat):
            num_bytes = check_chat(prompt, allow_template=self.allow_request_template)
            if prompt_format is not None and prompt.template is None:
                added = {r: _num_bytes("".join(t)) for r, t in prompt_format.turns.items()}
                num_bytes += sum(added.get(str(m.get("role")), 0) for m in prompt.messages)
        else:
            self.token_ids("token_ids" if name == "prompt" else f"{name}.token_ids", prompt)
            return
        if num_bytes > self.max_prompt_bytes:
            raise TooLongError(
                f"{name} has {num_bytes} bytes; limit {self.max_prompt_bytes} for a context of "
                f"{self.max_context} tokens",
                self.max_context,
            )

    def token_ids(self, name: str, ids: Sequence[int]) -> None:
        """Checks that these are tokens of the model, as many as the context at most."""
        if len(ids) > self.max_context:
            raise TooLongError(
                f"{name} has {len(ids)} tokens; limit {self.max_context}", self.max_context
            )
        self._token_ids(name, ids)

    def inputs(self, inputs: Sequence[ReadInput], limit: int) -> None:
        """Checks the inputs of a reading before they are tokenized."""
        if not inputs:
            raise InvalidArgumentError("the request has no inputs; give at least one")
        if len(inputs) > limit:
            raise InvalidArgumentError(f"the request has {len(inputs)} inputs; limit {limit}")
        for i, item in enumerate(inputs):
            if not isinstance(item, TextPair):
                self.prompt(item, name=f"inputs[{i}]")
                continue
            num_bytes = _num_bytes(item.first) + _num_bytes(item.second)
            if num_bytes > self.max_prompt_bytes:
                raise TooLongError(
                    f"inputs[{i}] has {num_bytes} bytes; limit {self.max_prompt_bytes} for a "
                    f"context of {self.max_context} tokens",
                    self.max_context,
                )

    def input_ids(self, index: int, ids: Sequence[int]) -> None:
        """Checks the tokens of an input: some, and no more than the context."""
        if not ids:
            raise InvalidArgumentError(f"inputs[{index}] is empty; give at least one token")
        if len(ids) > self.max_context:
            raise TooLongError(
                f"inputs[{index}] has {len(ids)} tokens; limit {self.max_context}",
                self.max_context,
            )

    def sampling(self, spec: GenerationSpec) -> SamplingParams:
        """Returns the sampling parameters with their defaults filled in, bad words left out."""
        seed = secrets.randbits(64) if spec.seed is None else spec.seed
        if not 0 <= seed < 1 << 64:
            raise InvalidArgumentError(f"seed is {seed}, must be from 0 to 2**64 - 1")
        top_k = spec.top_k or 0
        if top_k < 0:
            raise InvalidArgumentError(f"top_k is {top_k}, must be 0 (no limit) or more")
        self._biases(spec.logit_bias)
        self._token_ids("allowed_token_ids", spec.allowed_token_ids, self.vocab_size)
        self._token_ids("bad_token_ids", spec.bad_token_ids, MAX_BAD_TOKEN_IDS)
        _check_texts("bad_words", spec.bad_words, MAX_BAD_WORDS, MAX_BAD_WORD_BYTES)
        return SamplingParams(
            temperature=_number("temperature", spec.temperature, 0.0, 0.0, MAX_TEMPERATURE),
            top_p=_share("top_p", spec.top_p),
            top_k=min(top_k, self.vocab_size),
            seed=seed,
            min_p=_number("min_p", spec.min_p, 0.0, 0.0, 1.0),
            typical_p=_share("typical_p", spec.typical_p),
            presence_penalty=_number("presence_penalty", spec.presence_penalty, 0.0, -2.0, 2.0),
            frequency_penalty=_number("frequency_penalty", spec.frequency_penalty, 0.0, -2.0, 2.0),
            repetition_penalty=_number(
                "repetition_penalty", spec.repetition_penalty, 1.0, *REPETITION_PENALTIES
            ),
            no_repeat_ngram=_count("no_repeat_ngram", spec.no_repeat_ngram, 0, self.max_context),
            logit_bias=dict(spec.logit_bias),
            allowed_token_ids=tuple(spec.allowed_token_ids),
            bad_token_ids=tuple(spec.bad_token_ids),
            min_tokens=_count("min_tokens", spec.min_tokens, 0, self.max_context),
        )

    def stops(self, spec: GenerationSpec) -> StopPattern | None:
        """Checks stop texts and stop token ids, and returns the pattern that stops."""
        _check_texts("stop", spec.stop, MAX_STOPS, MAX_STOP_BYTES)
        self._token_ids("stop_token_ids", spec.stop_token_ids, MAX_STOP_TOKEN_IDS)
        return None if spec.stop_regex is None else StopPattern(spec.stop_regex)

    def rest(self, spec: GenerationSpec) -> None:
        """Checks what is wanted of outputs, choices and scheduling."""
        _count("n", spec.n, 1, MAX_CHOICES)
        _count("top_logprobs", spec.top_logprobs, 0, MAX_TOP)
        if spec.top_logprobs and not spec.logprobs:
            raise InvalidArgumentError(
                f"top_logprobs is {spec.top_logprobs} without logprobs; ask for logprobs as well"
            )
        _count("prompt_logprobs", spec.prompt_logprobs, 0, MAX_TOP)
        if spec.priority is not None and abs(spec.priority) > MAX_PRIORITY:
            raise InvalidArgumentError(
                f"priority is {spec.priority}, must be from -{MAX_PRIORITY} to {MAX_PRIORITY}"
            )
        if spec.timeout_s is not None and not 0 < spec.timeout_s < math.inf:
            raise InvalidArgumentError(f"timeout_s is {spec.timeout_s}, must be above 0 and finite")

    def grammar(self, spec: GenerationSpec) -> None:
        """Checks what can be known of a grammar, if there is one, before it is compiled."""
        if spec.grammar is None:
            return
        if spec.ignore_eos:
            raise InvalidArgumentError(
                "ignore_eos goes on behind the end, where a grammar allows nothing; leave out one"
            )
        num_bytes = _num_bytes(spec.grammar.source)
        if num_bytes > MAX_GRAMMAR_BYTES:
            raise InvalidArgumentError(
                f"{spec.grammar.kind.value} has {num_bytes} bytes; limit {MAX_GRAMMAR_BYTES}"
            )

    def max_tokens(self, spec: GenerationSpec, num_prompt_tokens: int) -> int:
        """Returns how many tokens may be generated after a prompt of this length."""
        if num_prompt_tokens == 0:
            raise InvalidArgumentError("the prompt is empty; give at least one token")
        requested = spec.max_tokens
        left = self.max_context - num_prompt_tokens
        if requested is None:
            requested = max(1, left)
        if requested == 0 and spec.prompt_logprobs is not None:
            self._scored_alone(spec, num_prompt_tokens)
        elif requested < 1:
            raise InvalidArgumentError(
                f"max_tokens is {requested}, must be at least 1, or 0 with prompt_logprobs"
            )
        if requested > left:
            raise TooLongError(
                f"prompt has {num_prompt_tokens} tokens and max_tokens is {requested}; together "
                f"they must be at most {self.max_context}",
                self.max_context,
            )
        if (spec.min_tokens or 0) > requested:
            raise InvalidArgumentError(
                f"min_tokens is {spec.min_tokens}, must be at most max_tokens, which is {requested}"
            )
        return requested

    def _scored_alone(self, spec: GenerationSpec, num_prompt_tokens: int) -> None:
        if spec.n not in (None, 1):
            raise InvalidArgumentError(
                f"max_tokens is 0, so there is nothing to choose; n is {spec.n}"
            )
        if num_prompt_tokens < 2:
            raise InvalidArgumentError(
                "the prompt has one token, which follows nothing; give at least two to score it"
            )

    def continuations(self, spec: ScoreSpec) -> None:
        """Checks what is to be scored before it is tokenized."""
        if not spec.continuations and not spec.prompt_logprobs:
            raise InvalidArgumentError("nothing to score; give continuations or prompt_logprobs")
        if len(spec.continuations) > MAX_CONTINUATIONS:
            raise InvalidArgumentError(
                f"{len(spec.continuations)} continuations; limit {MAX_CONTINUATIONS}"
            )
        for i, continuation in enumerate(spec.continuations):
            self.prompt(continuation, name=f"continuations[{i}]")

    def scored_prompt(self, num_prompt_tokens: int) -> None:
        """Checks a prompt once it is tokens, before its continuations are."""
        if num_prompt_tokens == 0:
            raise InvalidArgumentError("the prompt is empty; give at least one token")
        if num_prompt_tokens > self.max_context:
            raise TooLongError(
                f"prompt has {num_prompt_tokens} tokens, must be at most {self.max_context}",
                self.max_context,
            )

    def scored(self, num_prompt_tokens: int, continuations: Sequence[Sequence[int]]) -> None:
        """Checks prompt and continuations once they are tokens."""
        for i, continuation in enumerate(continuations):
            if not continuation:
                raise InvalidArgumentError(f"continuations[{i}] is empty; give at least one token")
            if num_prompt_tokens + len(continuation) > self.max_context:
                raise TooLongError(
                    f"prompt has {num_prompt_tokens} tokens and continuations[{i}] has "
                    f"{len(continuation)}; together they must be at most {self.max_context}",
                    self.max_context,
                )
        num_scored = sum(map(len, continuations))
        if num_scored > MAX_SCORED_TOKENS:
            raise InvalidArgumentError(
                f"continuations have {num_scored} tokens; limit {MAX_SCORED_TOKENS}, so that the "
                "scores fit a message; ask in several calls"
            )
        if not continuations and num_prompt_tokens < 2:
            raise InvalidArgumentError(
                "the prompt has one token, which follows nothing; give at least two to score it"
            )

    def _biases(self, biases: Mapping[int, float]) -> None:
        check_num_biases(len(biases))
        self._token_ids("logit_bias", list(biases), MAX_BIASES)
        for token_id, bias in biases.items():
            _number(f"logit_bias[{token_id}]", bias, 0.0, -MAX_BIAS, MAX_BIAS)

    def _token_ids(self, name: str, ids: Sequence[int], limit: int = 0) -> None:
        """Checks that there are at most `limit` ids, by default the context, all of tokens."""
        limit = limit or self.max_context
        if len(ids) > limit:
            raise InvalidArgumentError(f"{name} has {len(ids)} tokens; limit {limit}")
        if ids and not (min(ids) >= 0 and max(ids) < self.vocab_size):
            index = next(i for i, t in enumerate(ids) if not 0 <= t < self.vocab_size)
            raise InvalidArgumentError(
                f"{name}[{index}] = {ids[index]} is outside [0, {self.vocab_size})"
            )


def _number(name: str, value: float | None, default: float, low: float, high: float) -> float:
    """Returns a value, or its default; raises InvalidArgumentError outside of the two bounds."""
    value = default if value is None else value
    if not low <= value <= high:  # true for NaN, too
        raise InvalidArgumentError(f"{name} is {value}, must be from {low:g} to {high:g}")
    return value


def _share(name: str, value: float | None) -> float:
    value = 1.0 if value is None else value
    if not 0 < value <= 1:
        raise InvalidArgumentError(f"{name} is {value}, must be above 0 and at most 1")
    return value


def _count(name: str, value: int | None, low: int, high: int) -> int:
    value = low if value is None else value
    if not low <= value <= high:
        raise InvalidArgumentError(f"{name} is {value}, must be from {low} to {high}")
    return value


def _check_texts(name: str, texts: Sequence[str], most: int, most_bytes: int) -> None:
    if len(texts) > most:
        raise InvalidArgumentError(f"{name} has {len(texts)} strings; limit {most}")
    for index, text in enumerate(texts):
        num_bytes = _num_bytes(text)
        if not 0 < num_bytes <= most_bytes:
            raise InvalidArgumentError(
                f"{name}[{index}] has {num_bytes} bytes, must be 1 to {most_bytes}"
            )


def _num_bytes(text: str) -> int:
    return len(text.encode(errors="surrogatepass"))
