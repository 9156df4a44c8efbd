"""The messages of a chat, in the one form that templates and prompt formats are given."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from redmux.errors import InvalidArgumentError

from ..format.strictjson import shown

Message = Mapping[str, Any]  # as in OpenAI's chats: "role", "content" and what goes with them
ROLES = ("system", "user", "assistant", "tool")
_OTHER_NAMES = {"developer": "system"}
_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id")


def normal(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Returns messages whose content is a text, or absent beside tool calls.

    Parts of a content are joined by line breaks, arguments of tool calls are objects, the role
    "developer" is "system", and what is None is left out.

    Raises InvalidArgumentError, with the place, for what is not as in OpenAI's chats, and for
    contents that are no text.
    """
    return [_normal(f"message {i}", message) for i, message in enumerate(messages)]


def _normal(place: str, message: Message) -> dict[str, Any]:
    for key, value in message.items():
        if key not in _KEYS and value not in (None, [], {}, ""):
            raise InvalidArgumentError(
                f"{place} has the key {shown(key)}, which is not served; known: {', '.join(_KEYS)}"
            )
    role = message.get("role")
    role = _OTHER_NAMES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise InvalidArgumentError(
            f"{place} has role {shown(role)}; use system, user, assistant or tool"
        )
    written: dict[str, Any] = {"role": role}
    calls = message.get("tool_calls") or []
    content = message.get("content")
    if content is not None or not calls:
        written["content"] = _text(place, content)
    for key in ("name", "tool_call_id"):
        if (value := message.get(key)) is not None:
            if not isinstance(value, str):
                raise InvalidArgumentError(f"{place} has {key} {shown(value)}; it has to be a text")
            written[key] = value
    if calls:
        if role != "assistant":
            raise InvalidArgumentError(f"{place} has tool_calls; only an assistant's may")
        written["tool_calls"] = _calls(place, calls)
    return written


def _text(place: str, content: object) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise InvalidArgumentError(
            f"{place} has content {shown(content)}; it has to be a text or a list of text parts"
        )
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text":
            raise InvalidArgumentError(
                f"{place} has a content part {i} of type {shown(kind)}; only text is served"
            )
        text = part.get("text")
        if not isinstance(text, str):
            raise InvalidArgumentError(
                f"{place} has a content part {i} with text {shown(text)}; it has to be a text"
            )
        texts.append(text)
    return "\n".join(texts)


def _calls(place: str, calls: object) -> list[dict[str, Any]]:
    if not isinstance(calls, list | tuple):
        raise InvalidArgumentError(f"{place} has tool_calls {shown(calls)}; it has to be a list")
    return [_call(f"{place} has a tool call {i}", call) for i, call in enumerate(calls)]


def _call(place: str, call: object) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        raise InvalidArgumentError(f'{place} without a "function"; it has to be as in OpenAI\'s')
    if (kind := call.get("type", "function")) != "function":
        raise InvalidArgumentError(f"{place} of type {shown(kind)}; only function is served")
    name, identity = function.get("name"), call.get("id")
    if not isinstance(name, str) or not name:
        raise InvalidArgumentError(f"{place} with name {shown(name)}; it has to be a text")
    if identity is not None and not isinstance(identity, str):
        raise InvalidArgumentError(f"{place} with id {shown(identity)}; it has to be a text")
    written: dict[str, Any] = {} if identity is None else {"id": identity}
    arguments = _arguments(place, function.get("arguments"))
    return written | {"type": "function", "function": {"name": name, "arguments": arguments}}


def _arguments(place: str, value: object) -> dict[str, Any]:
    """Templates write arguments as JSON themselves, so what comes as JSON is parsed."""
    if value in (None, ""):
        return {}
    try:
        parsed = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, Mapping):
        raise InvalidArgumentError(
            f"{place} with arguments {shown(value)}; they have to be a JSON object"
        )
    return dict(parsed)
