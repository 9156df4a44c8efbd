"""Chats as messages of the wire, as callers write them: in the form of OpenAI's."""

import json
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from redmux._arguments import fill, put
from redmux.errors import InvalidArgumentError
from redmux.types import ToolCall
from redmux.v1 import inference_service_pb2 as pb

_MESSAGE_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id")
OPTIONS = (
    "template",
    "template_args",
    "add_generation_prompt",
    "continue_final_message",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
)
_FUNCTION_KEYS = ("name", "description", "parameters", "strict")


def chat(messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> pb.Chat:
    """Returns the message of a chat; `options` are those of OPTIONS that are given.

    Raises InvalidArgumentError, which names the place, for what no message can hold.
    """
    chat = pb.Chat(messages=[_message(item, f"prompt[{i}]") for i, item in enumerate(messages)])
    options = dict(options)
    tools, args = options.pop("tools", None), options.pop("template_args", None)
    for i, tool in enumerate(_list(tools or (), "tools")):
        chat.tools.append(_tool(tool, f"tools[{i}]"))
    if args is not None:
        chat.template_args_json = _json(args, "template_args")
    choice = options.pop("tool_choice", None)
    fill(chat, tool_choice=_choice(choice), **options)
    return chat


def tool_call(message: pb.ToolCall) -> ToolCall:
    """Returns the value of a whole call."""
    return ToolCall(message.id, message.name, message.arguments)


def _message(message: Mapping[str, Any], place: str) -> pb.ChatMessage:
    for key, value in message.items():
        if key not in _MESSAGE_KEYS and value not in (None, [], {}, ""):
            raise InvalidArgumentError(
                f"{place}: {key!r} is no key of a chat message; known are "
                f"{', '.join(_MESSAGE_KEYS)}"
            )
    calls, content = message.get("tool_calls") or (), message.get("content")
    if "role" not in message or (content is None and not calls):
        raise InvalidArgumentError(
            f"{place}: a chat message has the keys 'role' and 'content', "
            f"not {sorted(map(str, message))}"
        )
    turn = pb.ChatMessage()
    put(turn, "role", message["role"], f"{place}: role")
    if content is not None:
        put(turn, "content", _text(content, place), f"{place}: content")
    for key in ("name", "tool_call_id"):
        if message.get(key) is not None:
            put(turn, key, message[key], f"{place}: {key}")
    for i, call in enumerate(_list(calls, f"{place}: tool_calls")):
        turn.tool_calls.append(_call(call, f"{place}: tool_calls[{i}]"))
    return turn


def _text(content: object, place: str) -> object:
    """Returns a content, its parts of text joined by line breaks."""
    if not isinstance(content, list | tuple):
        return content
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise InvalidArgumentError(
                f"{place}: content[{i}] is {reprlib.repr(part)}; only parts of type text are served"
            )
        texts.append(part["text"])
    return "\n".join(texts)


def _call(call: object, place: str) -> pb.ToolCall:
    message = pb.ToolCall()
    if isinstance(call, ToolCall):
        fill(message, place=f"{place}.", id=call.id, name=call.name, arguments=call.arguments)
        return message
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        raise InvalidArgumentError(
            f"{place} is {reprlib.repr(call)}; give a ToolCall or "
            '{"id": ..., "type": "function", "function": {"name": ..., "arguments": ...}}'
        )
    arguments = function.get("arguments")
    if isinstance(arguments, Mapping):
        arguments = _json(arguments, f"{place}.arguments")
    fill(
        message, place=f"{place}.", id=call.get("id"), name=function.get("name"),
        arguments=arguments,
    )  # fmt: skip
    return message


def _tool(tool: object, place: str) -> pb.Tool:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(tool, Mapping) or not isinstance(function, Mapping):
        raise InvalidArgumentError(
            f"{place} is {reprlib.repr(tool)}; give "
            '{"type": "function", "function": {"name": ..., "parameters": ...}}'
        )
    if (kind := tool.get("type", "function")) != "function":
        raise InvalidArgumentError(f"{place}: type is {kind!r}; only function is served")
    for key in function:
        if key not in _FUNCTION_KEYS:
            raise InvalidArgumentError(
                f"{place}: {key!r} is no key of a function; known are {', '.join(_FUNCTION_KEYS)}"
            )
    message = pb.Tool()
    name, description = function.get("name"), function.get("description")
    fill(message, place=f"{place}.", name=name, description=description)
    if (parameters := function.get("parameters")) is not None:
        message.parameters_json = _json(parameters, f"{place}.parameters")
    return message


def _choice(choice: object) -> object:
    """Returns a choice as a text; that of a function may be in OpenAI's form."""
    if not isinstance(choice, Mapping):
        return choice
    function = choice.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InvalidArgumentError(
            f"tool_choice is {reprlib.repr(choice)}; give auto, none, required or a tool's name"
        )
    return function["name"]


def _list(value: Any, name: str) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise InvalidArgumentError(f"{name} is {reprlib.repr(value)}, must be a list")
    return value


def _json(value: object, name: str) -> str:
    if not isinstance(value, Mapping):
        raise InvalidArgumentError(f"{name} is {reprlib.repr(value)}, must be a mapping")
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as err:
        raise InvalidArgumentError(f"{name} cannot be written as JSON: {err}") from None
