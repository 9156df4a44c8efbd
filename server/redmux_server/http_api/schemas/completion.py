"""The body of /v1/completions."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from pydantic import Field, model_validator

from redmux_server.http_api.errors import Refusal
from redmux_server.http_api.schemas.body import Unserved
from redmux_server.http_api.schemas.prompts import Prompts
from redmux_server.http_api.schemas.sampling import SamplingBody

MAX_TOP_LOGPROBS = 20
_OTHERS: Unserved = {
    "suffix": (("",), "the model writes on from a prompt, it fills no gaps"),
    "add_special_tokens": ((True,), "send token ids to say what a prompt begins with"),
    "prompt_embeds": ((), "send the prompt as text or token ids"),
}


class CompletionBody(SamplingBody):
    """A request for completions of prompts."""

    unserved: ClassVar[Unserved] = {**SamplingBody.unserved, **_OTHERS}
    aliases: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **SamplingBody.aliases, "token_ids": ("prompt",), "top_logprobs": ("logprobs",),
    }  # fmt: skip

    prompt: Prompts
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    best_of: int | None = Field(None, description="The same as n; others are refused.")

    @classmethod
    def renamed(cls, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """See Body."""
        yield from super().renamed(given)
        yield r"^the prompt\b", "prompt"

    @model_validator(mode="after")
    def _checked(self) -> "CompletionBody":
        if self.best_of not in (None, self.n or 1):
            raise Refusal(
                f"best_of is {self.best_of} and n is {self.n or 1}; choices that are thrown away "
                "are not computed: ask for n and take the best by logprobs",
                param="best_of", code="unsupported_parameter",
            )  # fmt: skip
        if self.prompt_logprobs is not None and self.stream:
            raise Refusal(
                "prompt_logprobs has no place in a stream; use echo with logprobs",
                param="prompt_logprobs",
            )
        return self
