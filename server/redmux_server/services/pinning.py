"""Pins: the adapter that a request names, or the mix of several, as it is when it is accepted."""

import asyncio
from collections import OrderedDict
from dataclasses import dataclass
from typing import Protocol

from redmux.mixes import Mix
from redmux_adapters import Adapter, Summary, mix, recipe_digest
from redmux_adapters.format.files import summary_of
from redmux_server.registry.published import Published
from redmux_server.registry.registry import AdapterRegistry
from redmux_server.services.spec import AdapterRef

_MAX_KNOWN = 8192  # mixes whose digests are kept, of a few hundred bytes each


class Pinned(Protocol):
    """An adapter that requests may be computed with, whatever happens to its name."""

    @property
    def name(self) -> str:
        """What answers call it."""
        ...

    @property
    def digest(self) -> str:
        """Digest of the adapter."""
        ...

    @property
    def summary(self) -> Summary:
        """What is known of it without its vectors."""
        ...


@dataclass(frozen=True, slots=True)
class Mixed:
    """An adapter that is published nowhere: a mix of some that are."""

    name: str
    adapter: Adapter

    @property
    def digest(self) -> str:
        """Digest of the adapter."""
        return self.adapter.digest

    @property
    def summary(self) -> Summary:
        """What is known of it without its vectors."""
        return summary_of(self.adapter)


class Pins:
    """Resolves what requests name, each part of a mix as its tenant sees it.

    Belongs to the event loop; mixes are computed in threads. A mix is an adapter like others from
    there on: it is kept among those that were used last, by its digest, and computed again if it
    is not there any more.
    """

    def __init__(self, registry: AdapterRegistry) -> None:
        self._registry = registry
        self._known: OrderedDict[str, str] = OrderedDict()  # digest of the recipe -> of the mix

    async def pin(self, wanted: AdapterRef, tenant: str) -> Pinned | None:
        """Returns what is meant, None for the base model.

        Raises as `AdapterRegistry.resolve` does, and for a mix as `fetch` and `mix` do. A name is
        resolved before anything else happens.
        """
        if isinstance(wanted, Published):
            return wanted
        if not isinstance(wanted, Mix):
            return await self._registry.resolve(wanted, tenant) if wanted else None
        parts = [await self._registry.resolve(part.adapter, tenant) for part in wanted.parts]
        recipe = recipe_digest(wanted, [published.digest for published in parts])
        known = self._known.get(recipe)
        adapter = None if known is None else self._registry.ready(known)
        if adapter is None:
            adapter = await self._mixed(wanted, parts)
        self._known[recipe] = adapter.digest
        self._known.move_to_end(recipe)
        if len(self._known) > _MAX_KNOWN:
            self._known.popitem(last=False)
        return Mixed(str(wanted), adapter)

    async def fetch(self, pinned: Pinned) -> Adapter:
        """Returns the adapter; raises as `AdapterRegistry.fetch` does."""
        if isinstance(pinned, Mixed):
            return pinned.adapter
        assert isinstance(pinned, Published)
        return await self._registry.fetch(pinned)

    async def _mixed(self, wanted: Mix, parts: list[Published]) -> Adapter:
        # Two requests that come at once may both compute it: errors name the parts as each of them
        # does, and who calls a part how is nobody else's business.
        adapters = [await self._registry.fetch(published) for published in parts]
        # Each part is for the base at hand, or was taken all the same.
        adapter = await asyncio.to_thread(mix, wanted, adapters, allow_other_base=True)
        self._registry.keep(adapter)
        return adapter
