"""ToolFormat: how a chat template has a model write the calls of tools."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from redmux.errors import InvalidArgumentError

from .messages import Message

TAGS = {"<tool_call>": "</tool_call>", "<|python_tag|>": ""}
_NAME, _ARGUMENTS = "probed_function", {"probed_key": "probed"}
_USER: Message = {"role": "user", "content": "a"}
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "a",
        "parameters": {
            "type": "object",
            "properties": {"probed_key": {"type": "string", "description": "a"}},
            "required": ["probed_key"],
        },
    },
}
_FUNCTION = {"name": _NAME, "arguments": _ARGUMENTS}
_CALL: Message = {
    "role": "assistant",
    "tool_calls": [{"id": "call00000", "type": "function", "function": _FUNCTION}],
}
_RESULT: Message = {"role": "tool", "tool_call_id": "call00000", "name": _NAME, "content": "a"}

Render = Callable[[Sequence[Message], Sequence[Mapping[str, Any]], bool], str]


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """JSON objects of a name and arguments, between tags or bare.

    `before` is what the template writes from the `tag` on, up to the object of the first call, and
    `after` what follows the last. Between tags there may be a list of them.
    """

    tag: str = ""  # what begins a call; "" where the answer begins with the object
    before: str = ""
    after: str = ""
    is_list: bool = False
    arguments_key: str = "arguments"
    is_special: bool = False  # whether the tag is a special token, which no text has
    tokens: frozenset[str] = frozenset()  # those of the tags that are tokens of their own

    @property
    def end_tag(self) -> str:
        """What ends a call; "" for nothing."""
        return TAGS.get(self.tag, "")


def find_format(render: Render) -> ToolFormat | None:
    """Returns the format in which a template writes calls, or else tells the model to.

    `render` writes messages with tools, with what begins an answer or without. Returns None where
    that is none of the known formats.

    Raises InvalidArgumentError for a template that writes no tools at all.
    """
    shown = render([_USER], [_TOOL], True)
    if _NAME not in shown:
        raise InvalidArgumentError(
            "the chat template writes no tools; ask without tools, or with a template that does"
        )
    for messages in ([_USER, _CALL], [_USER, _CALL, _RESULT]):
        try:
            called = render(messages, [_TOOL], False)
        except InvalidArgumentError:
            continue
        if (found := _of_call(called, shown)) is not None:
            return found
    return _of_instruction(shown)


def _of_call(called: str, shown: str) -> ToolFormat | None:
    """Returns the format of a call that the template has written."""
    start = called.rfind(_NAME)
    while (start := called.rfind("{", 0, max(start, 0))) >= 0:
        try:
            call, end = json.JSONDecoder().raw_decode(called, start)
        except ValueError:
            continue
        if not isinstance(call, dict) or call.get("name") != _NAME:
            continue
        keys = [key for key, value in call.items() if value == _ARGUMENTS]
        return _around(called, start, end, keys[0], shown) if keys else None
    return None


def _around(called: str, start: int, end: int, key: str, shown: str) -> ToolFormat | None:
    before = called[:start].rstrip()
    if is_list := before.endswith("["):
        before = before[:-1].rstrip()
    for tag, end_tag in TAGS.items():
        if not before.endswith(tag):
            continue
        after = re.match(rf"\s*\]?\s*{re.escape(end_tag)}" if end_tag else "", called[end:])
        if after is None:
            return None
        begin = len(before) - len(tag)
        return ToolFormat(tag, called[begin:start], after[0], is_list, key)
    answer = shown.rstrip()
    is_bare = not is_list and called.startswith(answer) and len(answer) >= len(before)
    return ToolFormat(arguments_key=key) if is_bare else None


def _of_instruction(shown: str) -> ToolFormat | None:
    """Returns the format that a template tells the model about without writing it itself."""
    if "<tool_call>" in shown:
        if re.search(r"<tool_call>\s*\[", shown):
            return ToolFormat("<tool_call>", "<tool_call>[", "]</tool_call>", True)
        return ToolFormat("<tool_call>", "<tool_call>\n", "\n</tool_call>")
    if re.search(r"""['"]name['"]:[^{}]*['"]parameters['"]:[^{}]*[}<]""", shown):
        return ToolFormat(arguments_key="parameters")
    return None
