"""SamplingBody: what completions and chats have in common, as a GenerationSpec."""

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from redmux_server.http_api.errors import Refusal
from redmux_server.http_api.schemas.body import Body, Ids, Texts, Unserved
from redmux_server.http_api.schemas.grammar_names import grammar_names
from redmux_server.http_api.schemas.mix import MixBody
from redmux_server.http_api.sent import first_sent
from redmux_server.services.spec import AdapterRef, GenerationSpec, Grammar, GrammarKind, Prompt
from redmux_server.services.validation import check_num_biases

OneOrMore = Annotated[
    Texts, BeforeValidator(lambda v: [v] if isinstance(v, str) else v, str | list[str])
]


def _counted(biases: Any) -> Any:
    if isinstance(biases, dict):
        check_num_biases(len(biases))
    return biases


class StreamOptions(Body):
    """How a stream tells what it has used."""

    no_effect = frozenset(("include_obfuscation",))
    include_usage: bool = False
    continuous_usage_stats: bool = Field(False, description="Usage in every chunk, as in vLLM.")


class JsonSchema(Body):
    """A schema that an answer has to fit."""

    no_effect = frozenset(("description", "strict"))
    name: str = "answer"
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(Body):
    """What an answer has to look like, as in OpenAI's API."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Body):
    """What an answer has to look like, as in vLLM; one of them."""

    unserved: ClassVar[Unserved] = {
        "structural_tag": ((), "give a grammar of one of the other kinds"),
        "disable_any_whitespace": ((False,), "JSON is written as json.dumps does"),
        "disable_additional_properties": ((False,), "say it in the schema"),
        "whitespace_pattern": ((), "JSON is written as json.dumps does"),
        "backend": (("auto", "guidance", "llguidance"), "there is one backend"),
    }
    no_effect = frozenset(("disable_fallback",))
    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: Texts | None = None
    grammar: str | None = None
    json_object: bool | None = None


class SamplingBody(Body):
    """Sampling, stopping, outputs and structure; see docs/http.md for each field."""

    no_effect = frozenset((
        "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
        "prompt_cache_retention", "cache_salt", "request_id", "guided_decoding_backend",
    ))  # fmt: skip
    unserved: ClassVar[Unserved] = {
        "use_beam_search": ((False,), "there is no beam search; ask for n choices"),
        "length_penalty": ((1, 1.0), "there is no beam search"),
        "early_stopping": ((False,), "there is no beam search"),
        "truncate_prompt_tokens": ((), "prompts are never cut; send a shorter one"),
        "spaces_between_special_tokens": ((True,), "texts are decoded as the tokenizer does"),
        "guided_whitespace_pattern": ((), "JSON is written as json.dumps does"),
        "logits_processors": ((), "no code is taken from requests"),
        "kv_transfer_params": ((), "caches are not handed over"),
        "vllm_xargs": ((), "there are no plug-ins"),
        "lora_path": ((), "name the adapter as model"),
        "allowed_tokens": ((), "give allowed_token_ids"),
        "repetition_detection": ((), "use repetition_penalty or no_repeat_ngram_size"),
    }

    aliases: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "no_repeat_ngram": ("no_repeat_ngram_size",),
        "include_stop_str": ("include_stop_str_in_output",),
        "timeout_s": ("timeout",),
    }

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    # Sampling.
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    logit_bias: Annotated[dict[str, float], BeforeValidator(_counted)] | None = Field(
        None, description="By token id."
    )
    allowed_token_ids: Ids | None = None
    bad_words: Texts | None = None
    bad_token_ids: Ids | None = None
    n: int | None = None
    seed: int | None = None
    # Stopping.
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: OneOrMore | None = None
    stop_token_ids: Ids | None = None
    stop_regex: str | None = None
    ignore_eos: bool = False
    # Outputs.
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    # Structure.
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Texts | None = None
    guided_grammar: str | None = None
    mix: MixBody | None = Field(None, description="Several adapters as one; see docs/adapters.md.")
    apply: str | None = Field(
        None, description="Which tokens the adapter edits: all, prompt, generation or after:TEXT."
    )
    # Scheduling.
    priority: int | None = None
    timeout: float | None = Field(None, gt=0, description="Seconds.", allow_inf_nan=False)

    @classmethod
    def renamed(cls, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """See Body."""
        yield from super().renamed(given)
        yield from grammar_names(first_sent(given, _GRAMMARS))

    def spec(
        self, prompt: Prompt, adapter: AdapterRef, timeout_s: float | None, **more: Any
    ) -> GenerationSpec:
        """Returns what the services are asked for; `more` are fields of the spec."""
        fields: dict[str, Any] = {
            "max_tokens": self.max_tokens, "no_repeat_ngram": self.no_repeat_ngram_size,
            "logit_bias": _bias(self.logit_bias or {}), "stop": self.stop or (),
            "include_stop_str": self.include_stop_str_in_output, "grammar": self._grammar(),
            "timeout_s": timeout_s,
        }  # fmt: skip
        fields |= {name: getattr(self, name) for name in _SAME}
        fields |= {name: getattr(self, name) or () for name in _LISTS}
        return GenerationSpec(prompt, adapter, **fields | more)

    def _grammar(self) -> Grammar | None:
        given = [g for g in (*self._formats(), *self._guides()) if g is not None]
        if len(given) > 1:
            sent = [name for name in _GRAMMARS if getattr(self, name, None) is not None]
            raise Refusal(
                f"{', '.join(sent)} say in several ways what the answer has to look like; give one",
                param=sent[0],
            )
        return given[0] if given else None

    def _formats(self) -> list[Grammar | None]:
        given = self.response_format
        if given is None or given.type == "text":
            return []
        if given.type == "json_object":
            return [Grammar(GrammarKind.JSON_OBJECT)]
        if given.json_schema is None:
            raise Refusal(
                "response_format.json_schema is missing", param="response_format.json_schema"
            )
        return [schema_grammar(given.json_schema.schema_)]

    def _guides(self) -> list[Grammar | None]:
        inner = self.structured_outputs or StructuredOutputs(json=None)
        return [
            schema_grammar(self.guided_json), _regex(self.guided_regex),
            _choice(self.guided_choice), _lark(self.guided_grammar),
            schema_grammar(inner.json_), _regex(inner.regex), _choice(inner.choice),
            _lark(inner.grammar),
            Grammar(GrammarKind.JSON_OBJECT) if inner.json_object else None,
        ]  # fmt: skip


_GRAMMARS = (
    "response_format.json_schema", "response_format", "guided_json", "guided_regex",
    "guided_choice", "guided_grammar", "structured_outputs.json", "structured_outputs.regex",
    "structured_outputs.choice", "structured_outputs.grammar", "structured_outputs",
)  # fmt: skip
_SAME = (
    "temperature", "top_p", "top_k", "min_p", "typical_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "n", "seed", "min_tokens", "stop_regex", "ignore_eos",
    "skip_special_tokens", "priority", "apply",
)  # fmt: skip
_LISTS = ("allowed_token_ids", "bad_words", "bad_token_ids", "stop_token_ids")


def _bias(given: Mapping[str, float]) -> dict[int, float]:
    bias = {}
    for token, value in given.items():
        if not (token.isascii() and token.isdecimal() and len(token) < 20):
            raise Refusal(
                f"logit_bias has the key {token[:40]!r}, must be a token id", param="logit_bias"
            )
        bias[int(token)] = value
    return bias


def schema_grammar(given: Mapping[str, Any] | str | None) -> Grammar | None:
    """Returns the language of a JSON schema, None without one."""
    if given is None:
        return None
    source = given if isinstance(given, str) else json.dumps(given)
    return Grammar(GrammarKind.JSON_SCHEMA, source)


def _regex(given: str | None) -> Grammar | None:
    return None if given is None else Grammar(GrammarKind.REGEX, given)


def _choice(given: list[str] | None) -> Grammar | None:
    return None if given is None else Grammar(GrammarKind.CHOICE, json.dumps(given))


def _lark(given: str | None) -> Grammar | None:
    return None if given is None else Grammar(GrammarKind.LARK, given)
