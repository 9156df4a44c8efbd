"""The body of /v1/chat/completions."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from redmux_server.http_api.errors import Refusal
from redmux_server.http_api.schemas.body import Body, Objects, Unserved
from redmux_server.http_api.schemas.chat_names import chat_names
from redmux_server.http_api.schemas.completion import MAX_TOP_LOGPROBS
from redmux_server.http_api.schemas.sampling import SamplingBody
from redmux_server.services.chat import check_num_messages
from redmux_server.services.spec import Chat

_OTHERS: Unserved = {
    "audio": ((), "answers are text"),
    "modalities": ((["text"],), "answers are text"),
    "prediction": ((), "drafts are not taken from requests"),
    "web_search_options": ((), "nothing is looked up"),
    "functions": (([],), "give tools"),
    "function_call": (("none",), "give tool_choice"),
    "best_of": ((1,), "ask for n and take the best by logprobs"),
    "echo": ((False,), "use /v1/completions"),
    "documents": (([],), "put them into the messages"),
    "mm_processor_kwargs": ((), "messages are text"),
    "add_special_tokens": ((False,), "the template says what a prompt begins with"),
}


class ToolName(Body):
    """The name of a function."""

    name: str


class NamedTool(Body):
    """The function that has to be called."""

    type: Literal["function"] = "function"
    function: ToolName


class ChatBody(SamplingBody):
    """A request for the assistant's next message."""

    no_effect = SamplingBody.no_effect | {
        "reasoning_effort", "verbosity", "include_reasoning",
    }  # fmt: skip
    unserved: ClassVar[Unserved] = {**SamplingBody.unserved, **_OTHERS}
    aliases: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **SamplingBody.aliases,
        "max_tokens": ("max_completion_tokens", "max_tokens"),
        "template_args": ("chat_template_kwargs",),
    }
    messages: Objects = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = Field(None, description="Unless a message is continued.")
    continue_final_message: bool = False
    tools: Objects = Field(default_factory=list)
    tool_choice: str | NamedTool = "auto"
    parallel_tool_calls: bool = True
    parse_special_tokens: bool = Field(
        False, description="Whether what is written like a special token in a message is it."
    )

    @classmethod
    def renamed(cls, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """See Body."""
        yield from super().renamed(given)
        yield from chat_names("messages")

    def chat(self) -> Chat:
        """Returns the messages for the services."""
        check_num_messages(len(self.messages))
        is_open, choice = self.add_generation_prompt, self.tool_choice
        return Chat(
            self.messages,
            parse_special=self.parse_special_tokens,
            template=self.chat_template,
            add_generation_prompt=not self.continue_final_message if is_open is None else is_open,
            continue_final_message=self.continue_final_message,
            template_args=self.chat_template_kwargs or {},
            tools=self.tools,
            tool_choice=choice if isinstance(choice, str) else choice.function.name,
            parallel_tool_calls=self.parallel_tool_calls,
        )

    def outputs(self) -> dict[str, Any]:
        """Returns what of the spec is said in another way here than in completions."""
        if self.top_logprobs is not None and not self.logprobs:
            raise Refusal("top_logprobs is set, but logprobs is not true", param="top_logprobs")
        most = self.max_completion_tokens
        return {
            "max_tokens": self.max_tokens if most is None else most,
            "logprobs": self.logprobs,
            "top_logprobs": self.top_logprobs,
        }
