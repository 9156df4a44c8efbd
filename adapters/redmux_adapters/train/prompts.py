"""Texts of a training example as token ids, written as the server writes prompts."""

from collections.abc import Sequence
from typing import Any

from redmux.errors import InvalidArgumentError

from ..format.prompt import Part, PromptFormat, Turn
from ..text.encoder import TextEncoder
from ..text.messages import Message
from ..text.template import ChatOptions

CHATML = PromptFormat(
    user=Turn("<|im_start|>user\n", "<|im_end|>\n"),
    assistant=Turn("<|im_start|>assistant\n", "<|im_end|>\n"),
    system=Turn("<|im_start|>system\n", "<|im_end|>\n"),
)
RAW = PromptFormat(user=Turn("", ""), assistant=Turn("", ""))
STYLES = ("auto", "template", "chatml", "raw")
_Ids = tuple[int, ...]


class PromptWriter:
    """Encodes prompts and answers; prompt and answer apart, as a server generates.

    `style` is "template" (the base model's chat template), "chatml" (turns without the template's
    default system message), "raw" (the bare text), "auto" (template if there is one, else raw) or
    a PromptFormat. An answer ends with an end token, so that generation stops. Raises
    InvalidArgumentError for a template or an end token that the tokenizer does not have.
    """

    def __init__(
        self, tokenizer: Any, style: str | PromptFormat = "auto", eos_ids: Sequence[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._encoder = TextEncoder(tokenizer)
        self._eos_ids = [*eos_ids] or [tokenizer.eos_token_id]
        if style == "auto":
            style = "template" if getattr(tokenizer, "chat_template", None) else "raw"
        if style == "template" and not getattr(tokenizer, "chat_template", None):
            raise InvalidArgumentError(
                "the base model has no chat template; use the prompt format raw, chatml or "
                "turns of your own"
            )
        self._raw = style == "raw"
        turns = _format(style)
        # What goes into the adapter; None stands for the base model's template.
        self.prompt_format = None if turns is None else self._encoder.with_tokens(turns)
        self._suffix = None if self._raw else self._end_of_answer()

    def completion(self, prompt: str, answer: str) -> tuple[_Ids, _Ids]:
        """Returns the ids of a prompt, which is a user's message unless raw, and of its answer."""
        if not self._raw:
            return self.chat([{"role": "user", "content": prompt}], answer)
        return tuple(self._encoder.prompt(prompt).ids), self.bare(answer) + self._end()

    def chat(self, messages: Sequence[Message], answer: str) -> tuple[_Ids, _Ids]:
        """Returns the ids of a conversation up to the answer, and those of the answer."""
        rendered = self._encoder.render(messages, self.prompt_format)
        prompt = tuple(self._encoder.encode(rendered).ids)
        control = self._encoder.control_of(self.prompt_format)
        said = Part(answer, True)
        if self._suffix is None:
            return prompt, tuple(self._encoder.encode_parts([said], control)) + self._end()
        # Together, since a tokenizer may join the answer's end with what follows.
        ids = self._encoder.encode_parts([said, Part(self._suffix, False)], control)
        ends = [i for i in range(len(ids)) if ids[i] in self._eos_ids]
        return prompt, tuple(ids[: ends[-1] + 1])

    def pair(self, source: str, target: str, second: str | None = None) -> tuple[_Ids, _Ids]:
        """Returns the ids of an encoder's text and of the decoder's, which ends with the end.

        A second text of the encoder follows as its tokenizer joins two, as T5's `A</s> B</s>`.
        """
        return self.texts(source, second)[0], self.bare(target) + self._end()

    def texts(self, text: str, pair: str | None = None) -> tuple[_Ids, _Ids]:
        """Returns the ids of a text, or of two, as a server gives them to an encoder.

        With two come the types of their tokens, where the tokenizer has any.
        """
        if pair is None:
            return tuple(self._encoder.whole(text).ids), ()
        encoded, types = self._encoder.pair(text, pair)
        return tuple(encoded.ids), tuple(types or ())

    def _end_of_answer(self) -> str | None:
        """Returns what follows an answer up to its end token; None if that has to be added."""
        if self.prompt_format is not None:
            suffix = self.prompt_format.assistant.suffix
        else:
            user, answer = {"role": "user", "content": "a"}, "ANSWER"
            messages = [user, {"role": "assistant", "content": answer}]
            parts = self._encoder.template.render(messages, ChatOptions(is_open=False))
            suffix = "".join(part.text for part in parts).rpartition(answer)[2]
        suffix = suffix.rstrip()
        return suffix if any(i in self._eos_ids for i in self.bare(suffix)) else None

    def bare(self, text: str) -> _Ids:
        """Returns the ids of a text, with the special tokens that are written in it alone."""
        return tuple(self._encoder.bare(text))

    def _end(self) -> _Ids:
        if self._tokenizer.eos_token_id is None:
            raise InvalidArgumentError("the base model's tokenizer has no end-of-text token")
        return (self._tokenizer.eos_token_id,)


def _format(style: str | PromptFormat) -> PromptFormat | None:
    if isinstance(style, PromptFormat):
        return style
    formats = {"template": None, "chatml": CHATML, "raw": RAW}
    if style not in formats:
        raise InvalidArgumentError(
            f"unknown prompt format {style!r}; give one of {', '.join(STYLES)} or turns as in "
            "docs/format.md"
        )
    return formats[style]
