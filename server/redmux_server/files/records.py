"""Records: small JSON objects by id, in a folder or in memory."""

import asyncio
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from redmux_server.durable import refusals, sweep, sync_folder, write_whole

logger = logging.getLogger(__name__)


class Records:
    """Keeps what is written to it for the next start, where it has a folder.

    What is in them belongs to whoever writes them; this only brings it back. Belongs to the event
    loop.
    """

    def __init__(self, folder: Path | None, kind: str) -> None:
        """`kind` is what one of them is, for messages."""
        self._folder = folder
        self._kind = kind
        self._writing = asyncio.Lock()  # a record is written in the order of its changes

    def load(self) -> list[dict[str, Any]]:
        """Returns what earlier runs kept, the oldest first; what cannot be read is logged."""
        if self._folder is None or not self._folder.is_dir():
            return []
        sweep(self._folder)
        found = []
        for path in self._folder.glob("*.json"):
            try:
                record = json.loads(path.read_bytes())
                found.append((float(record["created_at"]), str(record["id"]), record))
            except (OSError, ValueError, TypeError, KeyError) as err:
                logger.error("%s of %s cannot be read: %s", self._kind, path, err)
        return [record for _, _, record in sorted(found, key=lambda item: item[:2])]

    async def write(self, record_id: str, record: Mapping[str, Any]) -> None:
        """Keeps a record, in place of what it was before.

        Raises ResourceExhaustedError or FailedPreconditionError with the system's reason.
        """
        if self._folder is None:
            return
        data = json.dumps(record).encode()
        # Who goes away in between must not let a later change be overtaken by this one.
        await asyncio.shield(self._in_turn(self._write, record_id, data))

    async def remove(self, record_id: str) -> None:
        """Forgets a record; raises as `write` does."""
        if self._folder is not None:
            await asyncio.shield(self._in_turn(self._remove, record_id))

    async def _in_turn(self, change: Callable[..., None], *args: Any) -> None:
        async with self._writing:
            await asyncio.to_thread(change, *args)

    def _write(self, record_id: str, data: bytes) -> None:
        assert self._folder is not None
        with refusals(self._folder, f"{self._kind} {record_id} is not kept", "data", "files"):
            write_whole(self._folder / f"{record_id}.json", data)

    def _remove(self, record_id: str) -> None:
        assert self._folder is not None
        with refusals(self._folder, f"{self._kind} {record_id} is not deleted", "data", "files"):
            (self._folder / f"{record_id}.json").unlink(missing_ok=True)
            if self._folder.is_dir():
                sync_folder(self._folder)
