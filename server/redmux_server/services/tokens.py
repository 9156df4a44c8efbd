"""TokenService: from prompts to tokens and back, below every protocol."""

from collections.abc import Sequence
from dataclasses import dataclass

from redmux.errors import FailedPreconditionError, InvalidArgumentError
from redmux_adapters.format.window import ALL
from redmux_server.models.text import TextCodec
from redmux_server.services.generation import GenerationService
from redmux_server.services.pinning import Pinned
from redmux_server.services.spec import Chat, GenerationSpec, TokenizeSpec
from redmux_server.services.validation import Validator


@dataclass(frozen=True, slots=True)
class Tokenized:
    """The tokens of a prompt, and the adapter whose format wrote it."""

    ids: list[int]
    num_added: int  # of them, special tokens that the server put there
    published: Pinned | None


class TokenService:
    """Tells what tokens a completion of a prompt begins with, and the text of tokens."""

    def __init__(
        self, codec: TextCodec, validator: Validator, generation: GenerationService | None
    ) -> None:
        """`generation` prepares prompts; None for a model that generates nothing."""
        self._codec = codec
        self._validator = validator
        self._generation = generation
        self._decode = codec.decoder(skip_special_tokens=False)

    @property
    def max_context(self) -> int:
        """The most tokens of a prompt and its completion together."""
        return self._validator.max_context

    async def tokenize(self, spec: TokenizeSpec, tenant: str) -> Tokenized:
        """Returns the tokens of a prompt; raises a RedmuxError for what cannot be served."""
        if self._generation is None:
            raise FailedPreconditionError(
                "the model is an encoder, which goes on from no prompt; the prompt_tokens in the "
                "usage of Embed tell how many tokens an input has"
            )
        is_chat = isinstance(spec.prompt, Chat)
        if is_chat and spec.add_special_tokens:
            raise InvalidArgumentError(
                "add_special_tokens is true; the template says what a chat begins with"
            )
        is_bare = not is_chat and spec.add_special_tokens is False
        if is_bare and self._generation.decoder_start is not None:
            raise InvalidArgumentError(
                "add_special_tokens is false; this model reads a prompt as a whole, with what ends "
                "it"
            )
        # What the adapter edits moves no token, so a marker need not be in the prompt.
        apply = ALL if spec.adapter else None
        prompt = GenerationSpec(spec.prompt, spec.adapter, apply=apply)
        prepared = await self._generation.prepare(prompt, tenant)
        if is_bare:
            return Tokenized(prepared.ids[prepared.num_added :], 0, prepared.published)
        return Tokenized(prepared.ids, prepared.num_added, prepared.published)

    def texts(self, ids: Sequence[int]) -> list[str]:
        """Returns the text of each token by itself; a part of a character is U+FFFD."""
        return [self._codec.tokens.of(token_id)[0] for token_id in ids]

    def detokenize(self, ids: Sequence[int], name: str = "token_ids") -> str:
        """Returns the text of tokens, special ones among them.

        Raises InvalidArgumentError, which calls them `name`, for what are none of the model's.
        """
        self._validator.token_ids(name, ids)
        return self._decode(list(ids))
