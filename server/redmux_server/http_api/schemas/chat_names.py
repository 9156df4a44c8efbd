"""What the services call the messages of a chat, for errors about the field that has them."""

from collections.abc import Iterator

from redmux_server.http_api.sent import of_name


def chat_names(name: str) -> Iterator[tuple[str, str]]:
    """Yields, for messages that came in the field of this name, what they are called; see Sent."""
    yield of_name("prompt", name)
    yield r"^the prompt\b", name
    yield r"^message (\d+)\b", rf"{name}[\1]"
    yield r"^the chat has (\d+) messages\b", rf"{name} has \1 messages"
    yield r"^the chat has (\d+) tools\b", r"tools has \1 tools"
    yield r"^(?:the chat|chat)(?= (?:has|holds)\b)", name
    yield r"^the request's chat template\b", "chat_template"
    yield ", or 0 with prompt_logprobs$", ""
