"""AdapterFolder: files of adapters in a folder that is only read, and watched."""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from watchfiles import awatch

from redmux.errors import (
    DataLossError,
    FailedPreconditionError,
    InvalidAdapterError,
    RedmuxError,
    ResourceExhaustedError,
)
from redmux_adapters import Limits, summarize
from redmux_adapters.format.files import read_file
from redmux_adapters.format.seal import owner_in
from redmux_server.registry.names import SUFFIX, check_name
from redmux_server.registry.published import Published, Rules
from redmux_server.registry.stamp import Stamp
from redmux_server.registry.tenants import OPERATOR
from redmux_server.registry.unusable import Unusable

logger = logging.getLogger(__name__)
logging.getLogger("watchfiles").setLevel(logging.WARNING)  # it counts events

_SETTLED_S = 0.2  # that a file has to stay as it is: nobody writes to it any more
_LOOK_S = 0.05
_EVENTS_MS = 50  # that events are gathered for
_POLL_S = 0.5
_START_S = 5.0


@dataclass(slots=True)
class FolderChanges:
    """What has become of a folder since it was looked at last."""

    found: list[Published | Unusable] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    is_settled: bool = True  # False while files are being written, which are left out


class AdapterFolder:
    """The adapter files of a folder, which belong to whoever lays them there.

    Each look blocks on the disk and compares what is there with what was there before, so a change
    that was missed is seen with the next one.
    """

    def __init__(self, path: Path, rules: Rules) -> None:
        """Raises FailedPreconditionError where there is no such folder."""
        self.path = path
        self._rules = rules
        self._known: dict[str, Stamp | None] = {}  # by name, what was told of
        self._seen: dict[str, tuple[Stamp | None, float]] = {}  # by name, and since when
        if not path.is_dir():
            raise FailedPreconditionError(
                f"adapter_dir: there is no folder {path}; make it, or give another one"
            )

    def open_all(self) -> FolderChanges:
        """Returns what is there at start; waits a moment for what is just being written."""
        changes, end_s = self.look(), time.monotonic() + _START_S
        while not changes.is_settled and time.monotonic() < end_s:
            time.sleep(_LOOK_S)
            more = self.look()
            changes.found += more.found
            changes.is_settled = more.is_settled
        num_bad = sum(isinstance(item, Unusable) for item in changes.found)
        logger.info("%d of %d adapter files in %s are usable", len(changes.found) - num_bad,
                    len(changes.found), self.path)  # fmt: skip
        return changes

    def look(self) -> FolderChanges:
        """Returns what has changed; vectors are read and checked, and dropped again.

        What cannot be used is in the log with its reason.
        """
        changes, paths = FolderChanges(), {}
        for path in sorted(self.path.glob(f"**/*{SUFFIX}")):
            paths[path.relative_to(self.path).as_posix().removesuffix(SUFFIX)] = path
        for name, path in paths.items():
            stamp = Stamp.of(path)
            if name in self._known and self._known[name] == stamp:
                continue
            item = self._read(name, path, stamp) if self._is_settled(name, stamp) else None
            if item is None:
                changes.is_settled = False
                continue
            self._known[name] = stamp
            self._seen.pop(name, None)
            changes.found.append(item)
        for name in [name for name in self._known if name not in paths]:
            del self._known[name]
            changes.gone.append(name)
        self._seen = {name: seen for name, seen in self._seen.items() if name in paths}
        return changes

    async def watch(self, tell: Callable[[FolderChanges], None]) -> None:
        """Tells of all changes from now on, within a second, until it is cancelled.

        Where the system tells of no more events, it looks by itself.
        """
        try:
            await self._watch_events(tell)
        except Exception:  # of the system, and of the library that asks it
            logger.exception("%s is looked at every half a second: it cannot be watched", self.path)
        while True:
            await self._look_until_settled(tell)
            await asyncio.sleep(_POLL_S)

    async def _watch_events(self, tell: Callable[[FolderChanges], None]) -> None:
        events = awatch(
            self.path, watch_filter=None, debounce=_EVENTS_MS, step=_EVENTS_MS,
            ignore_permission_denied=True,
        )  # fmt: skip
        while True:
            event = asyncio.ensure_future(anext(events))
            try:
                await asyncio.sleep(0)  # from here on events are gathered, so a look misses none
                await self._look_until_settled(tell)
                await event
            finally:
                event.cancel()

    async def _look_until_settled(self, tell: Callable[[FolderChanges], None]) -> None:
        while True:
            changes = await asyncio.to_thread(self.look)
            if changes.found or changes.gone:
                tell(changes)
            if changes.is_settled:
                return
            await asyncio.sleep(_LOOK_S)

    def _is_settled(self, name: str, stamp: Stamp | None) -> bool:
        """Whether a file has been as it is for a while."""
        if stamp is None:
            return True  # no file at all
        seen, since_s = self._seen.get(name, (None, 0.0))
        if seen == stamp:
            return time.monotonic() - since_s >= _SETTLED_S
        self._seen[name] = stamp, time.monotonic()
        newest_ns = max(stamp.modified_ns, stamp.changed_ns)
        return name not in self._known and time.time_ns() - newest_ns > _SETTLED_S * 1e9

    def _read(self, name: str, path: Path, stamp: Stamp | None) -> Published | Unusable | None:
        """Returns what a file is, None if it changes while it is read."""
        try:
            check_name(name)
            data = read_file(path, self._rules.limits.file_bytes)
            summary, owner = self._rules.summarize(data, None), owner_in(data) or OPERATOR
        except ResourceExhaustedError:
            return None  # of descriptors, say, which tells nothing of the file
        except RedmuxError as err:
            if Stamp.of(path) != stamp:
                return None
            logger.error("adapter file %s cannot be used: %s", path, err)
            return self._set_aside(name, path)
        if Stamp.of(path) != stamp:
            return None
        logger.info("adapter %s is %s, from %s", name, summary.digest, path)
        return Published(name, summary, path, self._rules, owner, stamp=stamp)

    def _set_aside(self, name: str, path: Path) -> Unusable:
        """Returns whose the file of a name is that cannot be used, and what to say about it."""
        owner = None
        try:
            data = read_file(path, Limits().file_bytes)
            owner = owner_in(data)
            summary = summarize(data)
            owner = owner or OPERATOR
            self._rules.check(summary.config)
            reason = "its modules are not those of this base model"
        except InvalidAdapterError:
            error = DataLossError(
                f"the file of adapter {name!r} in the server's folder is damaged; replace it there"
            )
            return Unusable(name, path, owner, error)
        except RedmuxError as err:
            reason = err.message
        return Unusable(
            name, path, owner,
            FailedPreconditionError(f"the adapter file of {name!r} cannot be used: {reason}"),
        )  # fmt: skip
