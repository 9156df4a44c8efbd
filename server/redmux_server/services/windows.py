"""Which tokens of a request its adapter edits."""

import functools
from collections.abc import Sequence

from redmux.errors import FailedPreconditionError, InvalidAdapterError, InvalidArgumentError
from redmux_adapters import Adapter
from redmux_adapters.format.window import ALL, check_apply, edited_positions, marker_of
from redmux_server.fair_thread import FairThread
from redmux_server.models.text import TextCodec
from redmux_server.services.spec import AdapterRef

_KEPT = 1024  # markers whose tokens are known


class Windows:
    """Turns what an adapter or a request says into positions of a prompt."""

    def __init__(self, codec: TextCodec, tokenizing: FairThread, *, has_source: bool) -> None:
        """`has_source`: an encoder reads prompts, so that they are no part of what is generated."""
        self._tokenizing = tokenizing
        self._has_source = has_source
        self._marker = functools.lru_cache(_KEPT)(lambda text: tuple(codec.encode_bare(text)))

    def check(self, apply: str | None, adapter: AdapterRef) -> None:
        """Checks what a request says of where its adapter, "" for none, edits."""
        if apply is None:
            return
        if not adapter:
            raise InvalidArgumentError(
                "apply tells which tokens the adapter edits, and the request names none"
            )
        try:
            check_apply(apply)
        except InvalidAdapterError as err:
            raise InvalidArgumentError(err.message) from None

    async def positions(
        self, adapter: Adapter | None, apply: str | None, prompt_ids: Sequence[int], tenant: str
    ) -> range:
        """Returns the positions that the adapter edits, as the request says if it does."""
        apply = apply or (ALL if adapter is None else adapter.apply)
        if apply != ALL and self._has_source:
            raise FailedPreconditionError(
                f"apply is {apply!r}; this model is an encoder-decoder, whose adapters edit all "
                "tokens"
            )
        marker = marker_of(apply)
        if marker is None:
            return edited_positions(apply, prompt_ids)
        ids = await self._tokenizing.run(tenant, len(marker), lambda: self._marker(marker))
        return edited_positions(apply, prompt_ids, ids)
