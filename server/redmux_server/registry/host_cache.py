"""HostCache: the adapters that were used last, ready in the host's memory."""

import asyncio
from collections import OrderedDict

from redmux_adapters import Adapter
from redmux_server.registry.published import Published

# Two tensors of a site beside their values, as measured on 64-bit CPython.
_SITE_BYTES = 1500


class HostCache:
    """Adapters by digest, least recently used out first, up to a number of bytes.

    Belongs to the event loop; files are read and checked in threads, each once however many
    requests wait for it.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._adapters: OrderedDict[str, Adapter] = OrderedDict()  # least recent first
        self._reading: dict[Published, asyncio.Task[Adapter]] = {}
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._adapters)

    def find(self, digest: str) -> Adapter | None:
        """Returns the adapter of this digest if it is here."""
        adapter = self._adapters.get(digest)
        if adapter is not None:
            self._adapters.move_to_end(digest)
        return adapter

    async def get(self, published: Published) -> Adapter:
        """Returns the adapter of this version; raises DataLossError as `Published.read` does."""
        adapter = self.find(published.digest)
        if adapter is not None:
            return adapter
        reading = self._reading.get(published)
        if reading is None:
            # By version, not by digest: a damaged file must not fail a name with the same content.
            reading = asyncio.create_task(self._read(published))
            self._reading[published] = reading
            reading.add_done_callback(lambda _: self._reading.pop(published))
        # Shielded: of many who wait, one may go away.
        return await asyncio.shield(reading)

    async def _read(self, published: Published) -> Adapter:
        adapter = await asyncio.to_thread(published.read)
        self.add(adapter)
        return adapter

    def add(self, adapter: Adapter) -> None:
        """Keeps an adapter as the most recently used one."""
        if adapter.digest in self._adapters:
            return
        self._adapters[adapter.digest] = adapter
        self.nbytes += _size(adapter)
        while self.nbytes > self._max_bytes:
            self.nbytes -= _size(self._adapters.popitem(last=False)[1])


def _size(adapter: Adapter) -> int:
    return adapter.nbytes + _SITE_BYTES * len(adapter.edits)
