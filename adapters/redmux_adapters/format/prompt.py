"""How an adapter's prompts were written in training, as data."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from redmux.errors import InvalidAdapterError, InvalidArgumentError

from .strictjson import require_text, shown

MAX_TURN_CHARS = 256
_ROLES = ("system", "user", "assistant")


class Turn(NamedTuple):
    """The text before and after a message of one role."""

    prefix: str
    suffix: str


@dataclass(frozen=True)
class PromptFormat:
    """The turns that an adapter was trained on: plain strings, no template language.

    Without `system`, system messages are refused. Each string has at most 256 characters and may
    be empty. Raises InvalidAdapterError on construction where that does not hold.
    """

    user: Turn
    assistant: Turn
    system: Turn | None = None

    def __post_init__(self) -> None:
        for role in _ROLES:
            turn = getattr(self, role)
            if turn is not None or role != "system":
                object.__setattr__(self, role, _turn(role, turn))

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that messages may have."""
        return tuple(role for role in _ROLES if getattr(self, role) is not None)

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Returns every message as prefix + content + suffix, then the assistant's prefix.

        Each message has the keys "role" and "content". Contents are inserted as they are: whoever
        tokenizes the text decides whether "<|im_end|>" inside one is a special token.

        Raises InvalidArgumentError without messages and for roles that the format does not have.
        """
        if not messages:
            raise InvalidArgumentError("no messages; give at least one user message")
        text = [self._render_one(index, message) for index, message in enumerate(messages)]
        return "".join(text) + self.assistant.prefix

    def to_json(self) -> dict[str, Any]:
        """Returns the value of `prompt_format` in adapter_config.json."""
        turns = {role: list(getattr(self, role)) for role in self.roles}
        return {"type": "turns", **turns}

    @classmethod
    def from_json(cls, value: object) -> "PromptFormat":
        """Returns the format that the parsed JSON `value` describes; raises InvalidAdapterError."""
        if not isinstance(value, dict) or value.get("type") != "turns":
            raise InvalidAdapterError(
                f'prompt_format is {shown(value)}; it has to be an object with "type": "turns"'
            )
        for key in value:
            if key not in ("type", *_ROLES):
                raise InvalidAdapterError(
                    f"unknown key {shown(key)} in prompt_format; known: type, {', '.join(_ROLES)}"
                )
        if "system" in value:
            return cls(value.get("user"), value.get("assistant"), _turn("system", value["system"]))  # type: ignore[arg-type]
        return cls(value.get("user"), value.get("assistant"))  # type: ignore[arg-type]

    def canonical(self) -> bytes:
        """Returns the bytes that stand for the format in an adapter's digest."""
        return json.dumps(self.to_json(), sort_keys=True, separators=(",", ":")).encode()

    def _render_one(self, index: int, message: Mapping[str, str]) -> str:
        role, content = message.get("role"), message.get("content")
        allowed = f"allowed: {', '.join(self.roles)}"
        if role == "system" and self.system is None:
            raise InvalidArgumentError(
                f"message {index} has role 'system', but the adapter was trained without a system "
                f"turn; {allowed}"
            )
        if role not in self.roles:
            raise InvalidArgumentError(f"message {index} has role {shown(role)}; {allowed}")
        if not isinstance(content, str):
            raise InvalidArgumentError(
                f"message {index} has content {shown(content)}; it has to be a string"
            )
        turn: Turn = getattr(self, role)
        return turn.prefix + content + turn.suffix


def _turn(role: str, value: object) -> Turn:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise InvalidAdapterError(
            f"prompt_format {role} is {shown(value)}; it has to be [prefix, suffix]"
        )
    prefix = require_text(value[0], f"prompt_format {role} prefix", MAX_TURN_CHARS)
    suffix = require_text(value[1], f"prompt_format {role} suffix", MAX_TURN_CHARS)
    return Turn(prefix, suffix)
