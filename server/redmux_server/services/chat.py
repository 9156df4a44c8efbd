"""Chats as they came in: what may be asked of them, checked before anything is rendered."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from redmux.errors import FailedPreconditionError, InvalidArgumentError
from redmux_adapters.format.strictjson import shown
from redmux_adapters.text.request_template import MAX_TEMPLATE_BYTES
from redmux_adapters.text.template import ChatOptions
from redmux_server.services.spec import Chat, Message

MAX_MESSAGES = 4096
MAX_TOOLS = 128
MAX_DEPTH = 64
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
CHOICES = ("none", "auto", "required")
_NUMBER_BYTES = 8


def check_chat(chat: Chat, *, allow_template: bool) -> int:
    """Returns how many bytes of text a chat brings, its tools and arguments included.

    Lists are counted before they are walked. Raises InvalidArgumentError for what no chat may have,
    and FailedPreconditionError for a template where the server takes none.
    """
    check_num_messages(len(chat.messages))
    check_num_tools(len(chat.tools))
    if chat.continue_final_message and chat.add_generation_prompt:
        raise InvalidArgumentError(
            "continue_final_message and add_generation_prompt exclude each other; set one to false"
        )
    if chat.template is not None:
        _check_template(chat.template, allow_template)
    names = {_tool_name(i, tool) for i, tool in enumerate(chat.tools)}
    if len(names) < len(chat.tools):
        raise InvalidArgumentError("two tools have one name; give each its own")
    _check_choice(chat.tool_choice, names)
    return said_bytes(chat.messages) + num_bytes(chat.tools) + num_bytes(chat.template_args)


def options_of(chat: Chat) -> ChatOptions:
    """Returns how a chat that was checked is to be written.

    With the tool choice "none" the model sees no tools. Tools have their keys in one order, as a
    template writes them in the order in which they stand.
    """
    return ChatOptions(
        parse_special=chat.parse_special,
        template=chat.template,
        args=chat.template_args,
        tools=[] if chat.tool_choice == "none" else [_written(tool) for tool in chat.tools],
        is_open=chat.add_generation_prompt,
        is_continued=chat.continue_final_message,
    )


def check_num_messages(number: int) -> None:
    """Raises InvalidArgumentError for more messages than a chat may have."""
    if number > MAX_MESSAGES:
        raise InvalidArgumentError(f"the chat has {number} messages; limit {MAX_MESSAGES}")


def check_num_tools(number: int) -> None:
    """Raises InvalidArgumentError for more tools than a chat may have."""
    if number > MAX_TOOLS:
        raise InvalidArgumentError(f"the chat has {number} tools; limit {MAX_TOOLS}")


def said_bytes(messages: Sequence[Message]) -> int:
    """Returns the bytes of all texts in messages, but for their roles; see `num_bytes`."""
    total = 0
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise InvalidArgumentError(f"message {i} is {shown(message)}; it has to be an object")
        total += sum(num_bytes(value, 1) for key, value in message.items() if key != "role")
    return total


def num_bytes(value: Any, depth: int = 0) -> int:
    """Returns the bytes of all texts in a value of JSON, keys of objects included.

    Raises InvalidArgumentError for one that is nested too deep, or no JSON.
    """
    if depth > MAX_DEPTH:
        raise InvalidArgumentError(f"the chat holds objects in more than {MAX_DEPTH} levels")
    if isinstance(value, str):
        return len(value.encode(errors="surrogatepass"))
    if isinstance(value, Mapping):
        return num_bytes(list(value), depth) + num_bytes(list(value.values()), depth)
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return sum(num_bytes(item, depth + 1) for item in value)
    if value is None:
        return 0
    if isinstance(value, bool | int | float):
        return _NUMBER_BYTES
    raise InvalidArgumentError(f"the chat holds {shown(value)}, which is no JSON")


def _check_template(template: str, allowed: bool) -> None:
    if not allowed:
        raise FailedPreconditionError(
            "this server takes no templates of requests; start it with --allow-request-template "
            "if everybody who may call it is trusted to run code in its sandbox"
        )
    if not template:
        raise InvalidArgumentError("the request's chat template is empty; leave it out")
    if (size := num_bytes(template)) > MAX_TEMPLATE_BYTES:
        raise InvalidArgumentError(
            f"the request's chat template has {size} bytes; limit {MAX_TEMPLATE_BYTES}"
        )


def _check_choice(choice: str, names: set[str]) -> None:
    if choice in ("none", "auto"):
        return
    if not names:
        raise InvalidArgumentError(f"tool_choice is {shown(choice)}, but the request has no tools")
    if choice != "required" and choice not in names:
        raise InvalidArgumentError(
            f"tool_choice is {shown(choice)}, which is none of the tools; use "
            f"{', '.join(CHOICES)} or the name of one"
        )


def _tool_name(index: int, tool: object) -> str:
    """Returns the name of a tool; raises InvalidArgumentError where it is not as in OpenAI's."""
    place = f"tools[{index}]"
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(tool, Mapping) or not isinstance(function, Mapping):
        raise InvalidArgumentError(
            f'{place} has to be {{"type": "function", "function": {{"name": ...}}}}'
        )
    if (kind := tool.get("type", "function")) != "function":
        raise InvalidArgumentError(f"{place} is of type {shown(kind)}; only function is served")
    for given, known in ((tool, {"type", "function"}), (function, _KINDS.keys())):
        if unknown := given.keys() - known:
            raise InvalidArgumentError(f"{place} has {shown(min(unknown))}, which is not served")
    for key, kind in _KINDS.items():
        if not isinstance(value := function.get(key), kind):
            raise InvalidArgumentError(f"{place} has {key} {shown(value)}, of a wrong kind")
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidArgumentError(
            f"{place} has name {shown(name)}; it has to be 1 to 64 letters, digits, _ and -"
        )
    if name in CHOICES:
        raise InvalidArgumentError(f"{place} has name {name!r}, which is a tool_choice; rename it")
    if (function.get("parameters") or {}).get("type", "object") != "object":
        raise InvalidArgumentError(f'{place} has parameters that are not of "type": "object"')
    return name


# What a function may have; None where it is absent.
_KINDS: dict[str, Any] = {
    "name": str,
    "description": str | None,
    "parameters": Mapping | None,
    "strict": bool | None,
}


def _written(tool: Mapping[str, Any]) -> dict[str, Any]:
    function = tool["function"]
    keys = [key for key in ("name", "description", "parameters") if function.get(key) is not None]
    return {"type": "function", "function": {key: function[key] for key in keys}}
