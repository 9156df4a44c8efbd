"""What the document of the door says of answers; they are written without these classes."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

# Of a stream the schema is that of each event, as OpenAPI before 3.2 has it.
_EVENT = {
    "type": "object", "required": ["data"], "additionalProperties": False,
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
}  # fmt: skip
EVENTS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": _EVENT}}}
}


class Answer(BaseModel):
    """What an answer has; fields with a default are only there at times."""

    model_config = ConfigDict(extra="forbid")


class Fault(Answer):
    """An error in OpenAI's shape."""

    message: str
    type: str
    param: str | None
    code: str


class Failure(Answer):
    """The body of an answer whose status is 400 or above."""

    error: Fault


class PromptDetails(Answer):
    """Of the tokens of a prompt, those that were not computed anew."""

    cached_tokens: int


class Usage(Answer):
    """The tokens that an answer has taken."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails | None = None


class Applied(Answer):
    """The adapter that was applied, both null for the base model, and what redmux tells besides."""

    adapter: str | None
    digest: str | None
    first_token_s: float | None = None
    total_s: float | None = None
    added_special_tokens: int | None = None


class PromptToken(Answer):
    """A token that might have been in the prompt's place."""

    logprob: float
    rank: int | None
    decoded_token: str


class TextLogprobs(Answer):
    """Log-probabilities of a completion, token by token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class Choice(Answer):
    """What completions and chats have of a choice."""

    index: int
    stop_reason: str | int | None
    token_ids: list[int] = Field(default_factory=list)


class TextChoice(Choice):
    """One completion of one prompt."""

    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]
    prompt_logprobs: list[dict[str, PromptToken] | None] = Field(default_factory=list)
    prompt_token_ids: list[int] = Field(default_factory=list)


class Generated(Answer):
    """What completions and chats have in common."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: Usage
    redmux: Applied


class Completion(Generated):
    """Completions of all prompts."""

    object: Literal["text_completion"]
    choices: list[TextChoice]


class FoundToken(Answer):
    """A token with its bytes."""

    token: str
    bytes: list[int]
    logprob: float


class ChatToken(FoundToken):
    """A token of an answer, and the likeliest in its place."""

    top_logprobs: list[FoundToken]


class ChatLogprobs(Answer):
    """Log-probabilities of a chat's answer."""

    content: list[ChatToken]
    refusal: None


class Function(Answer):
    """The function that is called; arguments are JSON."""

    name: str
    arguments: str


class ToolCall(Answer):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: Function


class AssistantMessage(Answer):
    """The assistant's message."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCall] = Field(default_factory=list)


class ChatChoice(Choice):
    """One answer to a chat."""

    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(Generated):
    """Answers to a chat."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    prompt_token_ids: list[int] = Field(default_factory=list)


class OutputText(Answer):
    """The text of a response."""

    type: Literal["output_text"]
    text: str
    annotations: list[dict[str, Any]]
    logprobs: list[ChatToken]


class OutputMessage(Answer):
    """The message of a response."""

    id: str
    type: Literal["message"]
    status: Literal["completed", "incomplete"]
    role: Literal["assistant"]
    content: list[OutputText]


class CachedTokens(Answer):
    """Of the tokens of an input, those that were not computed anew."""

    cached_tokens: int


class ReasoningTokens(Answer):
    """Always none: models that think aloud do so in their text."""

    reasoning_tokens: int


class ResponseUsage(Answer):
    """The tokens that a response has taken."""

    input_tokens: int
    input_tokens_details: CachedTokens
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int


class ResponseObject(Answer):
    """A response; what has no other value here is as OpenAI has it where nothing is asked for."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete"]
    background: bool
    error: None
    incomplete_details: dict[str, str] | None
    instructions: str | None
    max_output_tokens: int | None
    model: str
    output: list[OutputMessage]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: dict[str, None]
    service_tier: str
    store: bool
    temperature: float | None
    text: dict[str, Any]
    tool_choice: str
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float | None
    truncation: str
    usage: ResponseUsage
    metadata: dict[str, str]
    system_fingerprint: str
    redmux: Applied
