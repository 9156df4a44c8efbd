"""Chats and calls of tools between protobuf and what the services take."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from redmux.errors import InvalidArgumentError
from redmux.v1 import inference_service_pb2 as pb
from redmux_server.services.chat import check_num_messages, check_num_tools
from redmux_server.services.spec import Chat, Message
from redmux_server.services.tools import ToolCallDelta


def chat_of(message: pb.Chat) -> Chat:
    """Returns the chat of a message; raises InvalidArgumentError for what is no JSON in it."""
    check_num_messages(len(message.messages))
    check_num_tools(len(message.tools))
    if not message.messages:
        raise InvalidArgumentError("chat has no messages; give at least one user message")
    is_continued = message.continue_final_message
    is_open = message.add_generation_prompt if message.HasField("add_generation_prompt") else None
    return Chat(
        [_turn(turn) for turn in message.messages],
        parse_special=message.parse_special_tokens,
        template=message.template if message.HasField("template") else None,
        add_generation_prompt=not is_continued if is_open is None else is_open,
        continue_final_message=is_continued,
        template_args=_object(message.template_args_json, "template_args_json"),
        tools=[_tool(f"tools[{i}]", tool) for i, tool in enumerate(message.tools)],
        tool_choice=message.tool_choice or "auto",
        parallel_tool_calls=(
            not message.HasField("parallel_tool_calls") or message.parallel_tool_calls
        ),
    )


def plain_messages(place: str, message: pb.Chat) -> list[dict[str, str]]:
    """Returns the messages of a chat that has roles and contents only, as for training.

    Raises InvalidArgumentError for anything else that is set.
    """
    for part, known in ((message, {"messages"}), *((m, _PLAIN) for m in message.messages)):
        for field, _ in part.ListFields():
            if field.name not in known:
                raise InvalidArgumentError(
                    f"{place}.chat has {field.name}, which training does not take; leave it out"
                )
    return [{"role": turn.role, "content": turn.content} for turn in message.messages]


_PLAIN = {"role", "content"}


def tool_calls_of(deltas: Iterable[ToolCallDelta]) -> list[pb.ToolCall]:
    """Returns the messages of parts of calls."""
    return [pb.ToolCall(index=d.index, id=d.id, name=d.name, arguments=d.arguments) for d in deltas]


def _turn(message: pb.ChatMessage) -> Message:
    calls = [
        {"id": call.id, "function": {"name": call.name, "arguments": call.arguments}}
        for call in message.tool_calls
    ]
    return {
        "role": message.role,
        "content": message.content or (None if calls else ""),
        "tool_calls": calls,
        "tool_call_id": message.tool_call_id or None,
        "name": message.name or None,
    }


def _tool(place: str, message: pb.Tool) -> Mapping[str, Any]:
    function = {"name": message.name, "description": message.description or None}
    parameters = _object(message.parameters_json, f"{place}.parameters_json")
    return {"type": "function", "function": {**function, "parameters": parameters or None}}


def _object(text: str, name: str) -> Mapping[str, Any]:
    if not text:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as err:
        raise InvalidArgumentError(f"{name} is not valid JSON: {err}") from None
    if not isinstance(value, Mapping):
        raise InvalidArgumentError(f"{name} has to be a JSON object")
    return value
