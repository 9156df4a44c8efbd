"""The body of /v1/responses: what of it needs no memory of earlier answers."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from redmux_server.http_api.errors import Refusal
from redmux_server.http_api.schemas.body import Body, Objects, Unserved
from redmux_server.http_api.schemas.chat_names import chat_names
from redmux_server.http_api.schemas.grammar_names import grammar_names
from redmux_server.http_api.schemas.mix import MixBody
from redmux_server.http_api.schemas.sampling import JsonSchema, schema_grammar
from redmux_server.services.chat import check_num_messages
from redmux_server.services.spec import (
    AdapterRef,
    Chat,
    GenerationSpec,
    Grammar,
    GrammarKind,
    Message,
)

_Included = Annotated[list[Literal["message.output_text.logprobs"]], Field(fail_fast=True)]
_PARTS = ("input_text", "output_text", "text")
_ROLES = ("system", "developer", "user", "assistant")
_LOGPROBS = "message.output_text.logprobs"
_MEMORY = "nothing is kept; send the whole conversation as input"


class TextFormat(JsonSchema):
    """What the answer has to look like."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    schema_: dict[str, Any] | None = Field(None, alias="schema")  # type: ignore[assignment]

    def grammar(self) -> Grammar | None:
        """Returns it for the services."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return Grammar(GrammarKind.JSON_OBJECT)
        if self.schema_ is None:
            raise Refusal("text.format.schema is missing", param="text.format.schema")
        return schema_grammar(self.schema_)


class TextOptions(Body):
    """How the text of the answer is."""

    no_effect = frozenset(("verbosity",))
    format: TextFormat = Field(default_factory=lambda: TextFormat.model_validate({}))


class ResponseBody(Body):
    """A request for an answer to a conversation that is sent whole."""

    no_effect = frozenset((
        "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
        "prompt_cache_retention", "parallel_tool_calls", "reasoning", "max_tool_calls",
        "stream_options",
    ))  # fmt: skip
    unserved: ClassVar[Unserved] = {
        "previous_response_id": ((), _MEMORY),
        "conversation": ((), _MEMORY),
        "prompt": ((), "there are no stored prompts; send input"),
        "background": ((False,), "answers come at once"),
        "tools": (([],), "use /v1/chat/completions for tools"),
        "tool_choice": (("auto", "none"), "use /v1/chat/completions for tools"),
        "truncation": (("disabled",), "conversations are never cut; send a shorter one"),
        "context_management": (([],), _MEMORY),
    }
    aliases: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "max_tokens": ("max_output_tokens",), "timeout_s": ("timeout",),
    }  # fmt: skip
    model: str
    input: Annotated[
        Objects,
        BeforeValidator(
            lambda given: [{"role": "user", "content": given}] if isinstance(given, str) else given,
            str | list[dict[str, Any]],
        ),
    ] = Field(min_length=1)
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    include: _Included | None = None
    text: TextOptions = Field(default_factory=TextOptions)
    stream: bool = False
    seed: int | None = None
    ignore_eos: bool = False
    mix: MixBody | None = Field(None, description="Several adapters as one; see docs/adapters.md.")
    timeout: float | None = Field(None, gt=0, description="Seconds.", allow_inf_nan=False)
    parse_special_tokens: bool = Field(
        False, description="Whether what is written like a special token in a message is it."
    )

    @classmethod
    def renamed(cls, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """See Body."""
        yield from super().renamed(given)
        yield from grammar_names("text.format")
        yield from chat_names("input")

    @property
    def tells_logprobs(self) -> bool:
        """Whether log-probabilities are asked for."""
        return _LOGPROBS in (self.include or ())

    def spec(self, adapter: AdapterRef, timeout_s: float | None) -> GenerationSpec:
        """Returns what the services are asked for."""
        check_num_messages(len(self.input))
        messages = [_message(index, item) for index, item in enumerate(self.input)]
        if self.instructions is not None:
            messages.insert(0, {"role": "system", "content": self.instructions})
        return GenerationSpec(
            Chat(messages, parse_special=self.parse_special_tokens), adapter,
            temperature=self.temperature, top_p=self.top_p,
            seed=self.seed, ignore_eos=self.ignore_eos, max_tokens=self.max_output_tokens,
            logprobs=self.tells_logprobs,
            top_logprobs=self.top_logprobs if self.tells_logprobs else None,
            grammar=self.text.format.grammar(), timeout_s=timeout_s,
        )  # fmt: skip


def _message(index: int, item: Mapping[str, Any]) -> Message:
    """Returns an item of the input as a message of a chat; raises Refusal for other items."""
    kind = item.get("type", "message")
    if kind != "message":
        raise Refusal(
            f"input[{index}].type is {str(kind)[:40]!r}, must be 'message': tools and references "
            "are not served here", param=f"input[{index}].type", code="unsupported_parameter",
        )  # fmt: skip
    content = item.get("content")
    if isinstance(content, list):
        content = "".join(_text(index, place, part) for place, part in enumerate(content))
    if not isinstance(content, str) or not isinstance(item.get("role"), str):
        raise Refusal(
            f"input[{index}] has to have a role and a content, which are texts",
            param=f"input[{index}]",
        )  # fmt: skip
    if item["role"] not in _ROLES:
        raise Refusal(
            f"input[{index}].role is {item['role'][:40]!r}, must be one of {', '.join(_ROLES)}",
            param=f"input[{index}].role",
        )  # fmt: skip
    return {"role": item["role"], "content": content}


def _text(index: int, place: int, part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    text = part.get("text") if isinstance(part, dict) else None
    if kind not in _PARTS or not isinstance(text, str):
        raise Refusal(
            f"input[{index}].content[{place}] has the type {str(kind)[:40]!r}, must be a text of "
            f"one of {', '.join(_PARTS)}", param=f"input[{index}].content[{place}]",
            code="unsupported_parameter",
        )  # fmt: skip
    return text
