"""ChatTemplate: a base model's own way to write a chat, as parts."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from redmux.errors import InvalidArgumentError

from ..format.prompt import Part
from ..format.strictjson import shown
from .control import ControlTokens, any_of

Message = Mapping[str, Any]  # "role" and "content"
_OPEN, _CLOSE = "\ue000", "\ue001"  # private characters, which stand around a number
_HIDDEN = re.compile(f"{_OPEN}([0-9]+){_CLOSE}")
_ROLES = ("system", "user", "assistant")


class ChatTemplate:
    """Renders messages by the tokenizer's template.

    `control` has the tokens that contents may not become: the special ones, and those that the
    template names without taking contents apart by them, as many do by </think>.
    """

    def __init__(self, tokenizer: Any, control: ControlTokens) -> None:
        self._tokenizer = tokenizer
        template = getattr(tokenizer, "chat_template", None) or ""
        source = template if isinstance(template, str) else "\n".join(template.values())
        named = {text for text in control.others if text in source}
        self.control = frozenset(control.special) | {t for t in named if not _looks_for(source, t)}
        self._pattern = any_of({*self.control, _OPEN, _CLOSE})
        self._beginnings = {text[:n] for text in self.control for n in range(1, len(text))}
        self._longest = max(map(len, self._beginnings), default=0)

    def render(
        self, messages: Sequence[Message], *, parse_special: bool = False, is_open: bool = True
    ) -> list[Part]:
        """Returns the text of the messages, up to where an answer begins if it `is_open`.

        A template may strip contents and put them anywhere. So what must not become a special token
        has another name while the template is at work, and is content in what comes out.

        Raises InvalidArgumentError where there is no template and for what it cannot write.
        """
        if not getattr(self._tokenizer, "chat_template", None):
            raise InvalidArgumentError(
                "the base model has no chat template; send the prompt as text"
            )
        if not messages:
            raise InvalidArgumentError("chat has no messages")
        for message in messages:
            _check(message)
        if parse_special:
            return [Part(self._apply(messages, is_open), False)]
        numbers: dict[str, int] = {}

        def hide(text: str) -> str:
            return f"{_OPEN}{numbers.setdefault(text, len(numbers))}{_CLOSE}"

        text = self._apply(
            [{"role": m["role"], "content": self._hide(m["content"], hide)} for m in messages],
            is_open,
        )
        hidden = list(numbers)
        parts = [
            Part(hidden[int(piece)], True) if i % 2 else Part(piece, False)
            for i, piece in enumerate(_HIDDEN.split(text))  # text, number, text, ..., text
        ]
        if any(_OPEN in part.text or _CLOSE in part.text for part in parts if not part.is_content):
            raise InvalidArgumentError(
                "the base model's chat template cuts a content inside a text that is written like "
                "a special token; leave that out of the content"
            )
        return parts

    def _hide(self, content: str, hide: Callable[[str], str]) -> str:
        hidden = self._pattern.sub(lambda match: hide(match[0]), content)
        # Two contents may come to stand side by side, and make one together.
        stripped = hidden.rstrip()
        ends = (stripped[-n:] for n in range(1, self._longest + 1))
        if any(end in self._beginnings for end in ends):
            return stripped[:-1] + hide(stripped[-1]) + hidden[len(stripped) :]
        return hidden

    def _apply(self, messages: Sequence[Message], is_open: bool) -> str:
        from jinja2 import TemplateError

        try:
            text: str = self._tokenizer.apply_chat_template(
                [{"role": m["role"], "content": m["content"]} for m in messages],
                add_generation_prompt=is_open,
                tokenize=False,
            )
        except TemplateError as err:
            raise InvalidArgumentError(f"the base model's chat template refused: {err}") from None
        return text


def _check(message: Message) -> None:
    role, content = message.get("role"), message.get("content")
    if role not in _ROLES:
        raise InvalidArgumentError(f"unknown role {shown(role)}; use system, user or assistant")
    if not isinstance(content, str):
        raise InvalidArgumentError(f"a content is {shown(content)}; it has to be a text")


def _looks_for(source: str, token: str) -> bool:
    """Whether a template asks if contents hold a token, or does something to them by it."""
    quoted = f"['\"][^'\"]*{re.escape(token)}[^'\"]*['\"]"
    return re.search(rf"\.\w+\(\s*{quoted}|{quoted}\s*(?:not\s+)?in\b", source) is not None
