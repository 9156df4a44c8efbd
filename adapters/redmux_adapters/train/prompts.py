"""Texts of a training example as token ids, written as the server writes prompts."""

from collections.abc import Mapping, Sequence
from typing import Any

from redmux.errors import InvalidArgumentError

from ..format.prompt import PromptFormat, Turn

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
        self._eos_ids = [*eos_ids] or [tokenizer.eos_token_id]
        if style == "auto":
            style = "template" if getattr(tokenizer, "chat_template", None) else "raw"
        if style == "template" and not getattr(tokenizer, "chat_template", None):
            raise InvalidArgumentError(
                "the base model has no chat template; use the prompt format raw, chatml or "
                "turns of your own"
            )
        self._raw = style == "raw"
        # What goes into the adapter; None stands for the base model's template.
        self.prompt_format = _format(style)
        self._suffix = None if self._raw else self._end_of_answer()

    def completion(self, prompt: str, answer: str) -> tuple[_Ids, _Ids]:
        """Returns the ids of a prompt, which is a user's message unless raw, and of its answer."""
        if not self._raw:
            return self.chat([{"role": "user", "content": prompt}], answer)
        ids = self._tokenizer(prompt)["input_ids"]
        while ids and ids[-1] in self._eos_ids:
            ids = ids[:-1]
        return tuple(ids), self._ids(answer) + self._end()

    def chat(self, messages: Sequence[Mapping[str, str]], answer: str) -> tuple[_Ids, _Ids]:
        """Returns the ids of a conversation up to the answer, and those of the answer."""
        if self.prompt_format is not None:
            text = self.prompt_format.render(messages)
        else:
            text = self._template([dict(message) for message in messages], prompt=True)
        if self._suffix is None:
            return self._ids(text), self._ids(answer) + self._end()
        # Together, since a tokenizer may join the answer's end with what follows.
        ids = self._ids(answer + self._suffix)
        ends = [i for i in range(len(ids)) if ids[i] in self._eos_ids]
        return self._ids(text), ids[: ends[-1] + 1]

    def pair(self, source: str, target: str) -> tuple[_Ids, _Ids]:
        """Returns the ids of an encoder's text and of the decoder's, which ends with the end."""
        return self.texts(source)[0], self._ids(target) + self._end()

    def texts(self, text: str, pair: str | None = None) -> tuple[_Ids, _Ids]:
        """Returns the ids of a text, or of two, with the special tokens that the model expects.

        With two come the types of their tokens, where the tokenizer has any.
        """
        encoded = self._tokenizer(text, pair)
        types = encoded.get("token_type_ids") if pair is not None else None
        return tuple(encoded["input_ids"]), tuple(types or ())

    def _end_of_answer(self) -> str | None:
        """Returns what follows an answer up to its end token; None if that has to be added."""
        if self.prompt_format is not None:
            suffix = self.prompt_format.assistant.suffix
        else:
            user, answer = {"role": "user", "content": "a"}, "ANSWER"
            full = self._template([user, {"role": "assistant", "content": answer}], prompt=False)
            suffix = full.rpartition(answer)[2]
        suffix = suffix.rstrip()
        ids = self._ids(suffix)
        return suffix if any(i in self._eos_ids for i in ids) else None

    def _template(self, messages: list[dict[str, str]], prompt: bool) -> str:
        from jinja2 import TemplateError

        try:
            text: str = self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=prompt, tokenize=False
            )
        except (TemplateError, KeyError) as err:
            raise InvalidArgumentError(f"the base model's chat template refused: {err}") from None
        return text

    def _ids(self, text: str) -> _Ids:
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])

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
