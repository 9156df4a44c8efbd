"""ChatTemplate: a base model's or a request's way to write a chat, as parts."""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from redmux.errors import InvalidArgumentError

from ..format.prompt import Part
from ..format.strictjson import shown
from .control import ControlTokens, any_of
from .messages import Message, normal
from .request_template import RequestTemplate

_OPEN, _CLOSE = "\ue000", "\ue001"  # private characters, which stand around a number
# As they are, and as repr() and JSON in ASCII write them.
_OPENS, _CLOSES = (_OPEN, "\\ue000"), (_CLOSE, "\\ue001")
_HIDDEN = re.compile(rf"(?:{_OPEN}|\\ue000)([0-9]+)(?:{_CLOSE}|\\ue001)")
_CUT = f"{_OPEN}end{_CLOSE} "  # the blank tells whether the template strips contents


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """How a chat is written, beside its messages.

    `template` stands in for the adapter's format and the model's template, and gets `args` as
    variables. `tools` are as in OpenAI's chats. The text ends where an answer begins if it
    `is_open`, and inside the last message if that `is_continued`. With `parse_special`, what is
    written like a special token is that token.
    """

    parse_special: bool = False
    template: str | None = None
    args: Mapping[str, Any] = field(default_factory=dict)
    tools: Sequence[Mapping[str, Any]] = ()
    is_open: bool = True
    is_continued: bool = False


PLAIN = ChatOptions()


class ChatTemplate:
    """Renders messages by the tokenizer's template, or by `source`, which came with a request.

    `control` has the tokens that contents may not become: the special ones, and those that the
    template names without taking contents apart by them, as many do by </think>.
    """

    def __init__(self, tokenizer: Any, control: ControlTokens, source: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._own = None if source is None else RequestTemplate(source)
        self._whose = "the base model's" if source is None else "the request's"
        template = source or getattr(tokenizer, "chat_template", None) or ""
        self.source = template if isinstance(template, str) else "\n".join(template.values())
        named = {text for text in control.others if text in self.source}
        looked_for = {text for text in named if _looks_for(self.source, text)}
        self.control = frozenset(control.special) | (named - looked_for)
        hidden = any_of({*self.control, _OPEN, _CLOSE}).pattern
        # Not the backslash, which templates may have to double.
        self._pattern = re.compile(rf"{hidden}|(?<=\\)ue00[01]")
        self._beginnings = {text[:n] for text in self.control for n in range(1, len(text))}
        self._longest = max(map(len, self._beginnings), default=0)

    def render(self, messages: Sequence[Message], options: ChatOptions = PLAIN) -> list[Part]:
        """Returns the text of the messages.

        A template may strip contents and put them anywhere. So what must not become a special token
        has another name while the template is at work, and is content in what comes out: in
        contents, names, arguments, tools and variables alike.

        Raises InvalidArgumentError where there is no template and for what it cannot write.
        """
        if self._own is None and not self.source:
            raise InvalidArgumentError(
                "the base model has no chat template; send the prompt as text"
            )
        if not messages:
            raise InvalidArgumentError("chat has no messages")
        numbers: dict[str, int] = {}

        def hide(text: str) -> str:
            return f"{_OPEN}{numbers.setdefault(text, len(numbers))}{_CLOSE}"

        def data(value: Any) -> Any:
            return value if options.parse_special else _each_text(value, self._hide, hide)

        turns = [{**data(message), "role": message["role"]} for message in normal(messages)]
        if options.is_continued:
            _mark_end(turns[-1])
        self._check_args(options.args)
        text = self._apply(turns, data(list(options.tools)), data(dict(options.args)), options)
        if options.is_continued:
            text = self._before_mark(text)
        if options.parse_special:
            return [Part(text, False)]
        hidden = list(numbers)
        parts = [
            Part(hidden[int(piece)], True) if i % 2 else Part(piece, False)
            for i, piece in enumerate(_HIDDEN.split(text))  # text, number, text, ..., text
        ]
        around = [part.text for part in parts if not part.is_content]
        if any(mark in text for text in around for mark in (*_OPENS, *_CLOSES)):
            raise InvalidArgumentError(
                f"{self._whose} chat template cuts a content inside a text that is written like a "
                "special token; leave that out of the content"
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

    def _apply(
        self, turns: list[dict[str, Any]], tools: list[Any], args: dict[str, Any],
        options: ChatOptions,
    ) -> str:  # fmt: skip
        try:
            if self._own is None:
                text: str = self._tokenizer.apply_chat_template(
                    turns, tools=tools or None, add_generation_prompt=options.is_open,
                    tokenize=False, **args,
                )  # fmt: skip
                return text
            return self._own.render(
                {**self._tokenizer.special_tokens_map, **args, "messages": turns, "documents": None,
                 "tools": tools or None, "add_generation_prompt": options.is_open}
            )  # fmt: skip
        except InvalidArgumentError:
            raise
        except Exception as err:  # a stranger's code, which may raise anything
            raise InvalidArgumentError(f"{self._whose} chat template refused: {err}") from None

    def _check_args(self, args: Mapping[str, Any]) -> None:
        if not args:
            return
        taken = _taken() | self._tokenizer.special_tokens_map.keys()
        for name in args:
            if name in taken:
                raise InvalidArgumentError(
                    f"template_args has {shown(name)}, which is no variable for callers to set"
                )

    def _before_mark(self, text: str) -> str:
        before, mark, after = text.rpartition(_CUT.rstrip())
        if not mark:
            raise InvalidArgumentError(
                f"{self._whose} chat template does not write the final message where it could be "
                "continued"
            )
        return before if after.startswith(" ") else before.rstrip()


def _each_text(
    value: Any, change: Callable[[str, Callable[[str], str]], str], hide: Callable[[str], str]
) -> Any:
    """Returns JSON's value with every text in it changed, keys of objects as well."""
    if isinstance(value, str):
        return change(value, hide)
    if isinstance(value, Mapping):
        return {change(k, hide): _each_text(v, change, hide) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_each_text(item, change, hide) for item in value]
    return value


def _mark_end(message: dict[str, Any]) -> None:
    if "content" not in message:
        raise InvalidArgumentError("the final message has no content that could be continued")
    message["content"] += _CUT


def _taken() -> frozenset[str]:
    """Returns the names that mean something else to transformers than a variable."""
    from transformers import PreTrainedTokenizerBase
    from transformers.utils.chat_template_utils import render_jinja_template

    both = (PreTrainedTokenizerBase.apply_chat_template, render_jinja_template)
    names = {name for function in both for name in inspect.signature(function).parameters}
    return frozenset({*names, "messages", *PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES})


def _looks_for(source: str, token: str) -> bool:
    """Whether a template asks if contents hold a token, or does something to them by it."""
    quoted = f"['\"][^'\"]*{re.escape(token)}[^'\"]*['\"]"
    return re.search(rf"\.\w+\(\s*{quoted}|{quoted}\s*(?:not\s+)?in\b", source) is not None
