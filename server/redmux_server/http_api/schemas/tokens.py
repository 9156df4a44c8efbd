"""Bodies of /tokenize and /detokenize."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from pydantic import Field, model_validator

from redmux_server.http_api.errors import Refusal
from redmux_server.http_api.schemas.body import Body, Ids, Objects, Unserved
from redmux_server.http_api.schemas.chat_names import chat_names
from redmux_server.services.chat import check_num_messages
from redmux_server.services.spec import AdapterRef, Chat, TokenizeSpec


class TokenizeBody(Body):
    """A text, or the messages of a chat."""

    unserved: ClassVar[Unserved] = {
        "mm_processor_kwargs": ((), "prompts are texts"),
    }
    model: str
    prompt: str | None = None
    messages: Objects | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = Field(None, description="Unless a message is continued.")
    continue_final_message: bool = False
    tools: Objects = Field(default_factory=list)
    parse_special_tokens: bool = Field(
        False, description="Whether what is written like a special token in a message is it."
    )
    aliases: ClassVar[Mapping[str, tuple[str, ...]]] = {"template_args": ("chat_template_kwargs",)}

    @classmethod
    def renamed(cls, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """See Body."""
        yield from super().renamed(given)
        if given.get("messages") is not None:
            yield from chat_names("messages")

    @model_validator(mode="after")
    def _checked(self) -> "TokenizeBody":
        if (self.prompt is None) == (self.messages is None):
            raise Refusal("give either prompt or messages", param="prompt")
        return self

    def spec(self, adapter: AdapterRef) -> TokenizeSpec:
        """Returns what the services are asked for."""
        return TokenizeSpec(self._prompt(), adapter, self.add_special_tokens)

    def _prompt(self) -> str | Chat:
        if self.prompt is not None:
            return self.prompt
        messages = self.messages or []
        check_num_messages(len(messages))
        is_open = self.add_generation_prompt
        return Chat(
            messages, template=self.chat_template, template_args=self.chat_template_kwargs or {},
            add_generation_prompt=not self.continue_final_message if is_open is None else is_open,
            continue_final_message=self.continue_final_message, tools=self.tools,
            parse_special=self.parse_special_tokens,
        )  # fmt: skip


class DetokenizeBody(Body):
    """Tokens."""

    model: str
    tokens: Ids

    @classmethod
    def renamed(cls, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """See Body."""
        yield from super().renamed(given)
        yield r"^tokens\.token_ids\b", "tokens"
