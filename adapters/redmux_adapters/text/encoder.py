"""TextEncoder: what a model is given of a text, a pair or a chat. docs/prompts.md has the rule."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import chain
from typing import Any, NamedTuple

from redmux.errors import InvalidArgumentError, WrongBaseError

from ..format.prompt import Part, PromptFormat
from .control import ControlTokens, joined
from .messages import Message, normal
from .template import PLAIN, ChatOptions, ChatTemplate
from .tool_format import ToolFormat, find_format

_KEPT = 16  # templates of requests


class Encoded(NamedTuple):
    """Token ids, and how many of them are special tokens that were added to a text."""

    ids: list[int]
    num_added: int = 0


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """A chat as text, part by part, and the tokens that its contents may not become."""

    parts: Sequence[Part]
    control: frozenset[str]
    is_framed: bool  # whether it gets what the tokenizer puts around any text

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(part.text for part in self.parts)


class TextEncoder:
    """Encodes texts, pairs and chats with a tokenizer, alike for training, serving and scoring.

    A prompt, which the model goes on from, begins with what the tokenizer puts before any text
    (BOS); nothing is put behind it. A text that is read as a whole gets what the tokenizer puts on
    either side. What a text has there already is not put there again. Encoding mutates the
    tokenizer's settings, so an encoder belongs to one thread, but for `check`.
    """

    def __init__(self, tokenizer: Any, *, reads_prompts: bool = False) -> None:
        """`reads_prompts` is for models that read prompts as a whole: encoder-decoders."""
        self._tokenizer = tokenizer
        self._reads_prompts = reads_prompts
        self._control = ControlTokens(tokenizer)
        self.template = ChatTemplate(tokenizer, self._control)
        self._of_request = lru_cache(_KEPT)(partial(ChatTemplate, tokenizer, self._control))
        self._tool_format = lru_cache(_KEPT)(self._found_format)
        self._begin, self._end = _frame(tokenizer)
        self._frame_tokens = dict(zip(_texts(tokenizer, self._begin), self._begin, strict=True))

    def prompt(self, text: str) -> Encoded:
        """Returns a text that the model goes on from, or reads as a whole if that is its way."""
        return self._framed(self.bare(text), with_end=self._reads_prompts)

    def whole(self, text: str) -> Encoded:
        """Returns a text that is read as a whole: to be classified, embedded or answered."""
        return self._framed(self.bare(text), with_end=True)

    def pair(self, first: str, second: str) -> tuple[Encoded, list[int] | None]:
        """Returns two texts in one input, joined as the tokenizer joins them, and their types.

        The types tell of each token which of the two it belongs to; None for a model without any.
        """
        encoded = self._tokenizer(first, second, return_special_tokens_mask=True)
        ids = Encoded(encoded["input_ids"], sum(encoded["special_tokens_mask"]))
        return ids, encoded.get("token_type_ids")

    def bare(self, text: str) -> list[int]:
        """Returns a text without any special tokens but those that are written in it."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def continuation(self, prompt: str | None, prompt_ids: Sequence[int], text: str) -> list[int]:
        """Returns a text that follows a prompt.

        The two are tokenized together, as a tokenizer may treat the beginning of a text in its own
        way, unless the prompt is no text or would get other tokens than `prompt_ids`.
        """
        if prompt is not None:
            together = self.prompt(prompt + text).ids
            if together[: len(prompt_ids)] == list(prompt_ids):
                return together[len(prompt_ids) :]
        return self.bare(text)

    def render(
        self, messages: Sequence[Message], prompt_format: PromptFormat | None,
        options: ChatOptions = PLAIN,
    ) -> RenderedChat:  # fmt: skip
        """Returns a chat in the template of `options`, else in `prompt_format`, else the model's.

        Raises InvalidArgumentError for what the format or the template cannot write.
        """
        if prompt_format is None or options.template is not None:
            template = self._template(options.template)
            # A template writes the special tokens that it wants.
            parts = joined(template.render(messages, options))
            return RenderedChat(parts, template.control, self._reads_prompts)
        parts = _turns(prompt_format, normal(messages), options)
        if options.parse_special:
            parts = [Part(part.text, False) for part in parts]
        return RenderedChat(joined(parts), self.control_of(prompt_format), True)

    def tool_format(self, template: str | None) -> ToolFormat:
        """Returns how the model's template, or a request's, has calls of tools written.

        Raises InvalidArgumentError where it writes no tools, or calls in a way that is not known.
        """
        found = self._tool_format(template)
        if found is None:
            raise InvalidArgumentError(
                "the chat template writes calls of tools in a way that this server does not read; "
                "it reads JSON, bare or between <tool_call> and </tool_call>"
            )
        return found

    def encode(self, chat: RenderedChat) -> Encoded:
        """Returns a rendered chat; raises as `encode_parts` does."""
        ids = self.encode_parts(chat.parts, chat.control)
        return self._framed(ids, with_end=self._reads_prompts) if chat.is_framed else Encoded(ids)

    def encode_parts(self, parts: Sequence[Part], control: frozenset[str]) -> list[int]:
        """Returns parts in a row, whose contents hold none of the tokens of `control`.

        Raises InvalidArgumentError where the tokenizer cannot keep what is written like one apart.
        """
        ids = self._control.encode(parts, control)
        if ids is not None:
            return ids
        text = "".join(part.text for part in parts)
        meant = [self._control.listed(part.text) for part in parts if not part.is_content]
        surplus = Counter(self._control.listed(text)) - Counter(chain.from_iterable(meant))
        if found := control & surplus.keys():
            raise InvalidArgumentError(
                f"a content holds {', '.join(map(repr, sorted(found)))}, which this model's "
                "tokenizer takes for special tokens; leave that out, or set parse_special_tokens "
                "if it is meant as such"
            )
        return self.bare(text)

    def control_of(self, prompt_format: PromptFormat | None) -> frozenset[str]:
        """Returns the tokens that contents may not become: special ones and those of the turns."""
        if prompt_format is None:
            return self.template.control
        return frozenset(self._control.special) | self._found_in(prompt_format).keys()

    def with_tokens(self, prompt_format: PromptFormat) -> PromptFormat:
        """Returns the format with the tokens that its prompts hold when they are written here."""
        tokens = self._frame_tokens | self._found_in(prompt_format)
        return replace(prompt_format, tokens=tuple(sorted(tokens.items())))

    def check(self, prompt_format: PromptFormat | None) -> None:
        """Raises WrongBaseError where a format's tokens are others here, from any thread.

        What a format does not tell of its tokens is not checked.
        """
        if prompt_format is None or prompt_format.tokens is None:
            return
        expected = dict(prompt_format.tokens)
        found = self._frame_tokens | self._found_in(prompt_format)
        for text in sorted(expected.keys() | found.keys()):
            if expected.get(text) != found.get(text):
                raise WrongBaseError(
                    f"the adapter's prompts were written with {_said(text, expected)}, this base's "
                    f"tokenizer writes them with {_said(text, found)}; serve it on the base and "
                    "with the tokenizer that it was trained with"
                )

    def _template(self, source: str | None) -> ChatTemplate:
        return self.template if source is None else self._of_request(source)

    def _found_format(self, source: str | None) -> ToolFormat | None:
        template = self._template(source)

        def render(messages: Sequence[Message], tools: Sequence[Any], is_open: bool) -> str:
            options = ChatOptions(parse_special=True, tools=tools, is_open=is_open)
            return "".join(part.text for part in template.render(messages, options))

        if (found := find_format(render)) is None:
            return None
        tokens = self._control.special.keys() | self._control.others.keys()
        return replace(
            found,
            is_special=found.tag in self._control.special,
            tokens=frozenset(tokens & {found.tag, found.end_tag}),
        )

    def _found_in(self, prompt_format: PromptFormat) -> dict[str, int]:
        found: dict[str, int] = {}
        for turn in prompt_format.turns.values():
            for text in turn:
                found |= self._control.found_in(text)
        return found

    def _framed(self, ids: list[int], *, with_end: bool) -> Encoded:
        """Puts the tokenizer's own tokens around, but for what is there already."""
        begin, end = list(self._begin), list(self._end) if with_end else []
        if ids[: len(begin)] == begin:
            begin = []
        if end and ids[-len(end) :] == end:
            end = []
        return Encoded([*begin, *ids, *end], len(begin) + len(end))


def _turns(
    prompt_format: PromptFormat, messages: Sequence[Message], options: ChatOptions
) -> list[Part]:
    """Returns the parts of a chat in an adapter's format, which has turns and nothing else."""
    if options.tools or any(m["role"] == "tool" or "tool_calls" in m for m in messages):
        raise InvalidArgumentError(
            "the adapter's prompt format cannot write tools, their calls or their results; leave "
            "them out, or use a template of the request"
        )
    if options.args:
        raise InvalidArgumentError(
            "the adapter's prompt format takes no template_args; leave them out"
        )
    parts = prompt_format.parts(messages)
    if options.is_continued:
        return parts[:-2]  # without what ends the last message and begins the next
    return parts if options.is_open else parts[:-1]


def _frame(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the special tokens that a tokenizer puts before and behind any text."""
    for text in ("a", "A", "0"):  # the first that it knows
        framed = tokenizer(text)["input_ids"]
        bare = tokenizer(text, add_special_tokens=False)["input_ids"]
        if bare:
            break
    starts = range(len(framed) - len(bare) + 1)
    start = next((i for i in starts if framed[i : i + len(bare)] == bare), 0)
    return tuple(framed[:start]), tuple(framed[start + len(bare) :])


def _texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    texts: list[str] = tokenizer.convert_ids_to_tokens(list(ids))
    return texts


def _said(text: str, ids: dict[str, int]) -> str:
    return f"the token {text!r} of id {ids[text]}" if text in ids else f"no token {text!r}"
