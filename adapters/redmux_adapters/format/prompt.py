"""How an adapter's prompts were written in training, as data."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from redmux.errors import InvalidAdapterError, InvalidArgumentError

from .strictjson import require_text, shown

MAX_TURN_CHARS = 256
MAX_TOKENS = 256
_MAX_ID = 2**31 - 1
_ROLES = ("system", "user", "assistant")
_KEYS = ("type", *_ROLES, "tokens")


class Turn(NamedTuple):
    """The text before and after a message of one role."""

    prefix: str
    suffix: str


class Part(NamedTuple):
    """A part of a chat as text: what somebody said, or what stands around it."""

    text: str
    is_content: bool


@dataclass(frozen=True)
class PromptFormat:
    """The turns that an adapter was trained on: plain strings, no template language.

    Without `system`, system messages are refused. Each string has at most 256 characters and may
    be empty. `tokens` are the special tokens in prompts of the format, (text, id) in order of text,
    with the tokenizer that wrote them in training; None where the adapter does not say. Raises
    InvalidAdapterError on construction where that does not hold.
    """

    user: Turn
    assistant: Turn
    system: Turn | None = None
    tokens: tuple[tuple[str, int], ...] | None = None

    def __post_init__(self) -> None:
        for role in _ROLES:
            turn = getattr(self, role)
            if turn is not None or role != "system":
                object.__setattr__(self, role, _turn(role, turn))
        if self.tokens is not None:
            object.__setattr__(self, "tokens", _tokens(dict(self.tokens)))

    @property
    def turns(self) -> dict[str, Turn]:
        """The turn of each role that messages may have."""
        return {role: getattr(self, role) for role in self.roles}

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that messages may have."""
        return tuple(role for role in _ROLES if getattr(self, role) is not None)

    def parts(self, messages: Sequence[Mapping[str, str]]) -> list[Part]:
        """Returns every message as prefix, content and suffix, then the assistant's prefix.

        Each message has the keys "role" and "content".

        Raises InvalidArgumentError without messages and for roles that the format does not have.
        """
        if not messages:
            raise InvalidArgumentError("no messages; give at least one user message")
        parts: list[Part] = []
        for index, message in enumerate(messages):
            parts += self._parts_of(index, message)
        return [*parts, Part(self.assistant.prefix, False)]

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Returns the parts as one text; raises as `parts` does.

        What is written like a special token in a content is one for whoever tokenizes this text: a
        server tokenizes the parts.
        """
        return "".join(part.text for part in self.parts(messages))

    def to_json(self) -> dict[str, Any]:
        """Returns the value of `prompt_format` in adapter_config.json."""
        value: dict[str, Any] = {"type": "turns"}
        value.update((role, list(turn)) for role, turn in self.turns.items())
        if self.tokens is not None:
            value["tokens"] = dict(self.tokens)
        return value

    @classmethod
    def from_json(cls, value: object) -> "PromptFormat":
        """Returns the format that the parsed JSON `value` describes; raises InvalidAdapterError."""
        if not isinstance(value, dict) or value.get("type") != "turns":
            raise InvalidAdapterError(
                f'prompt_format is {shown(value)}; it has to be an object with "type": "turns"'
            )
        for key in value:
            if key not in _KEYS:
                raise InvalidAdapterError(
                    f"unknown key {shown(key)} in prompt_format; known: {', '.join(_KEYS)}"
                )
        return cls(
            _turn("user", value.get("user")),
            _turn("assistant", value.get("assistant")),
            _turn("system", value["system"]) if "system" in value else None,
            _tokens(value["tokens"]) if "tokens" in value else None,
        )

    def canonical(self) -> bytes:
        """Returns the bytes that stand for the format in an adapter's digest."""
        return json.dumps(self.to_json(), sort_keys=True, separators=(",", ":")).encode()

    def _parts_of(self, index: int, message: Mapping[str, str]) -> list[Part]:
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
        return [Part(turn.prefix, False), Part(content, True), Part(turn.suffix, False)]


def _turn(role: str, value: object) -> Turn:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise InvalidAdapterError(
            f"prompt_format {role} is {shown(value)}; it has to be [prefix, suffix]"
        )
    prefix = require_text(value[0], f"prompt_format {role} prefix", MAX_TURN_CHARS)
    suffix = require_text(value[1], f"prompt_format {role} suffix", MAX_TURN_CHARS)
    return Turn(prefix, suffix)


def _tokens(value: object) -> tuple[tuple[str, int], ...]:
    if not isinstance(value, dict) or len(value) > MAX_TOKENS:
        raise InvalidAdapterError(
            f"prompt_format tokens is {shown(value)}; it has to be an object of at most "
            f"{MAX_TOKENS} token ids by the token's text"
        )
    for text, token_id in value.items():
        require_text(text, "prompt_format tokens: a text", MAX_TURN_CHARS)
        if type(token_id) is not int or not 0 <= token_id <= _MAX_ID:
            raise InvalidAdapterError(
                f"prompt_format tokens: {shown(text)} is {shown(token_id)}; it has to be a token id"
            )
    return tuple(sorted(value.items()))
