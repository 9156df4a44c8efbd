"""TextCodec: between text and the token ids of the base model."""

from collections.abc import Callable, Sequence
from typing import Any

from redmux_adapters import PromptFormat
from redmux_adapters.text.encoder import Encoded, TextEncoder
from redmux_adapters.text.messages import Message
from redmux_adapters.text.template import PLAIN, ChatOptions
from redmux_adapters.text.tool_format import ToolFormat
from redmux_server.models.token_bytes import TokenBytes
from redmux_server.models.too_long import TooLongError

MAX_BYTES_PER_TOKEN = 16  # more than any tokenizer packs into one on average
_CHARS_PER_TOKEN = 4
_UNSURE = 64  # tokens at the end of a piece of text that its other part may make fewer


class TextCodec:
    """Encodes prompts and decodes completions with the base model's tokenizer.

    Whatever encodes takes the most tokens that may come of it, None for any number, and raises
    TooLongError for more, most of the time without tokenizing all of them.

    Encoding mutates the tokenizer's settings, so it belongs to one thread; the rest to any.
    """

    def __init__(
        self, tokenizer: Any, generation_config: Any, *, reads_prompts: bool = False
    ) -> None:
        """`reads_prompts` is for models that read prompts as a whole: encoder-decoders."""
        self._encoder = TextEncoder(tokenizer, reads_prompts=reads_prompts)
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._decode = _decoder(tokenizer, skip_special_tokens=True)
        self._decode_all = _decoder(tokenizer, skip_special_tokens=False)
        # For the event loop, which decodes.
        self.tokens = TokenBytes(tokenizer, self._decode_all, self._encoder.bare("a"))
        eos = generation_config.eos_token_id if generation_config is not None else None
        ids = eos if isinstance(eos, list) else [eos]
        self.eos_token_ids = frozenset(i for i in (*ids, tokenizer.eos_token_id) if i is not None)

    def encode(self, text: str, most: int | None = None) -> Encoded:
        """Returns the ids of a text that the model goes on from; see docs/prompts.md."""
        self._check_length("prompt", text, most)
        return self._encoder.prompt(text)

    def encode_input(self, text: str, most: int | None = None) -> Encoded:
        """Returns the ids of a text that is read as a whole; see docs/prompts.md."""
        self._check_length("input", text, most)
        return self._encoder.whole(text)

    def encode_pair(
        self, first: str, second: str, most: int | None = None
    ) -> tuple[Encoded, list[int] | None]:
        """Returns the ids of two texts in one input, and of each token whose part it belongs to.

        The latter is None for a model that does not tell parts apart.
        """
        for text in (first, second):
            self._check_length("input", text, most)
        return self._encoder.pair(first, second)

    def encode_chat(
        self,
        messages: Sequence[Message],
        prompt_format: PromptFormat | None,
        options: ChatOptions = PLAIN,
        *,
        most: int | None = None,
    ) -> Encoded:
        """Returns the ids of a conversation; see TextEncoder.render."""
        chat = self._encoder.render(messages, prompt_format, options)
        if most is not None and (num_bytes := _num_bytes(chat.text)) > MAX_BYTES_PER_TOKEN * most:
            raise TooLongError(
                f"the chat has {num_bytes} bytes with its turns; limit "
                f"{MAX_BYTES_PER_TOKEN * most} for a context of {most} tokens",
                most,
            )
        self._check_length("prompt", chat.text, most)
        return self._encoder.encode(chat)

    def tool_format(self, template: str | None) -> ToolFormat:
        """Returns how calls of tools are written; see TextEncoder.tool_format."""
        return self._encoder.tool_format(template)

    def encode_bare(self, text: str) -> list[int]:
        """Returns the ids of a text alone, without any special token."""
        return self._encoder.bare(text)

    def encode_continuation(
        self, prompt: str | None, prompt_ids: Sequence[int], text: str, most: int | None = None
    ) -> list[int]:
        """Returns the ids of a text that follows a prompt; see TextEncoder.continuation."""
        self._check_length("continuation", text, most)
        return self._encoder.continuation(prompt, prompt_ids, text)

    def check_format(self, prompt_format: PromptFormat | None) -> None:
        """Raises WrongBaseError where the format's special tokens are others in this model."""
        self._encoder.check(prompt_format)

    def tokenizer_json(self) -> str | None:
        """Returns the tokenizer as the tokenizers library writes it, None if it is another kind."""
        return None if self._backend is None else self._backend.to_str()

    def decode(self, token_ids: Sequence[int]) -> str:
        """Returns the text of these ids, without special tokens."""
        return self._decode(list(token_ids))

    def decoder(self, *, skip_special_tokens: bool = True) -> Callable[[Sequence[int]], str]:
        """Returns what makes text of ids, with the special tokens among them or without."""
        return self._decode if skip_special_tokens else self._decode_all

    def _check_length(self, what: str, text: str, most: int | None) -> None:
        """Refuses a text whose beginning alone has too many tokens."""
        if most is None or len(text) <= _CHARS_PER_TOKEN * most:
            return
        least = len(self._encoder.bare(text[: _CHARS_PER_TOKEN * most])) - _UNSURE
        if least > most:
            raise TooLongError(f"{what} has more than {least} tokens; limit {most}", most)


def _num_bytes(text: str) -> int:
    return len(text.encode(errors="surrogatepass"))


def _decoder(tokenizer: Any, *, skip_special_tokens: bool) -> Callable[[Sequence[int]], str]:
    """Returns the tokenizer's decoding of ids without clean-up.

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
        return lambda ids: backend.decode(ids, skip_special_tokens=skip_special_tokens)
    return lambda ids: tokenizer.decode(
        ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
    )
