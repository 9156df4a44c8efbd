"""TextCodec: between text and the token ids of the base model."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from redmux.errors import InvalidArgumentError
from redmux_adapters import PromptFormat


class TextCodec:
    """Encodes prompts and decodes completions with the base model's tokenizer.

    Encoding mutates the tokenizer's settings, so it belongs to one thread; decoding to any.
    """

    def __init__(
        self, tokenizer: Any, generation_config: Any, *, closes_chats: bool = False
    ) -> None:
        """`closes_chats` is for models whose prompt is a whole text of its own, with its end."""
        self._tokenizer = tokenizer
        self._closes_chats = closes_chats
        self._decode = _decoder(tokenizer)
        eos = generation_config.eos_token_id if generation_config is not None else None
        ids = eos if isinstance(eos, list) else [eos]
        self.eos_token_ids = frozenset(i for i in (*ids, tokenizer.eos_token_id) if i is not None)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a raw text, with the special tokens the model expects around it."""
        ids: list[int] = self._tokenizer(text)["input_ids"]
        return ids

    def encode_pair(self, first: str, second: str) -> tuple[list[int], list[int] | None]:
        """Returns the ids of two texts in one input, and of each token whose part it belongs to.

        The latter is None for a model that does not tell parts apart.
        """
        encoded = self._tokenizer(first, second)
        return encoded["input_ids"], encoded.get("token_type_ids")

    def encode_chat(
        self, messages: Sequence[Mapping[str, str]], prompt_format: PromptFormat | None
    ) -> list[int]:
        """Returns the ids of a conversation up to where the assistant's answer begins.

        Rendered in `prompt_format`, or in the model's own chat template where that is None.
        """
        if prompt_format is not None:
            text = prompt_format.render(messages)
        else:
            text = self._apply_template(messages)
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        if self._closes_chats:
            closed = self.encode(text)
            if closed[-1:] != ids[-1:]:  # else the template has written the end itself
                return closed
        return ids

    def encode_continuation(
        self, prompt: str | None, prompt_ids: Sequence[int], text: str
    ) -> list[int]:
        """Returns the ids of a text behind a prompt, without special tokens.

        The two are tokenized together, as a tokenizer may treat the beginning of a text in its own
        way, unless the prompt is no text or would get other tokens than `prompt_ids`.
        """
        if prompt is not None:
            together = self._tokenizer(prompt + text)["input_ids"]
            if together[: len(prompt_ids)] == list(prompt_ids):
                ids: list[int] = together[len(prompt_ids) :]
                return ids
        alone: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return alone

    def decode(self, token_ids: Sequence[int]) -> str:
        """Returns the text of these ids, without special tokens."""
        return self._decode(list(token_ids))

    def _apply_template(self, messages: Sequence[Mapping[str, str]]) -> str:
        from jinja2 import TemplateError

        if not self._tokenizer.chat_template:
            raise InvalidArgumentError(
                "the base model has no chat template; send the prompt as text"
            )
        for message in messages:
            if message["role"] not in ("system", "user", "assistant"):
                raise InvalidArgumentError(
                    f"unknown role {message['role'][:80]!r}; use system, user or assistant"
                )
        if not messages:
            raise InvalidArgumentError("chat has no messages")
        try:
            text: str = self._tokenizer.apply_chat_template(
                [dict(m) for m in messages], add_generation_prompt=True, tokenize=False
            )
        except TemplateError as err:
            raise InvalidArgumentError(f"the base model's chat template refused: {err}") from None
        return text


def _decoder(tokenizer: Any) -> Callable[[list[int]], str]:
    """Returns the tokenizer's decoding of ids without special tokens and without clean-up.

    transformers' way to the same function of the tokenizers library takes five times as long, twice
    for every token that is streamed.
    """
    from transformers import PreTrainedTokenizerFast

    kind = type(tokenizer)
    if (
        isinstance(tokenizer, PreTrainedTokenizerFast)
        and kind.decode is PreTrainedTokenizerFast.decode
        and kind._decode is PreTrainedTokenizerFast._decode
    ):
        backend = tokenizer.backend_tokenizer
        return lambda ids: backend.decode(ids, skip_special_tokens=True)
    return lambda ids: tokenizer.decode(
        ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
