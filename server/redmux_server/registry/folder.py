"""AdapterFolder: the files of adapters that were put, each sealed with its owner and a checksum."""

import contextlib
import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from redmux.errors import (
    DataLossError,
    FailedPreconditionError,
    InvalidAdapterError,
    RedmuxError,
)
from redmux_adapters import Adapter, Limits, summarize
from redmux_adapters.format.files import read_file, summary_of, to_sealed_bytes
from redmux_adapters.format.seal import owner_in
from redmux_server.durable import sweep
from redmux_server.registry import disk
from redmux_server.registry.folder_index import Entry, Stamp, read_index, write_index
from redmux_server.registry.names import SUFFIX, check_name
from redmux_server.registry.published import Published, Rules
from redmux_server.registry.tenants import OPERATOR

logger = logging.getLogger(__name__)

_MANY = 64  # files; reading fewer takes milliseconds
_SETTLED_NS = 2_000_000_000


@dataclass(frozen=True, slots=True)
class Unusable:
    """A file that cannot be served; it stays for a person to look at, or until it is replaced."""

    name: str
    path: Path
    owner: str | None  # None where it does not tell
    error: RedmuxError  # for whoever asks for the name

    @property
    def is_damaged(self) -> bool:
        """Whether it is no sound adapter, of whatever base model."""
        return isinstance(self.error, DataLossError)

    def fresh_error(self) -> RedmuxError:
        """Returns the error, to be raised once."""
        return type(self.error)(self.error.message)


class AdapterFolder:
    """Files of adapters in a folder. Every method blocks on the disk."""

    def __init__(self, path: Path, rules: Rules) -> None:
        self.path = path
        self._rules = rules
        self._indexed: set[tuple[str, Stamp]] = set()  # files that the folder's index has

    def open_all(self) -> list[Published | Unusable]:
        """Returns what is there, in order of name.

        Every file that changed since an earlier run indexed it is read and checked, and its vectors
        are dropped again. What cannot be used is in the log with its reason.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        sweep(self.path)
        index = read_index(self.path, self._rules.base_fingerprint)
        self._indexed = {(name, entry.stamp) for name, entry in index.items()}
        # Threads would take longer: most of the work needs the interpreter's lock.
        return [self._open(path, index) for path in sorted(self.path.glob(f"**/*{SUFFIX}"))]

    def store(self, name: str, adapter: Adapter, owner: str) -> Published:
        """Makes an adapter durable under a name; raises as `disk.write` does."""
        disk.write(self.path, name, to_sealed_bytes(adapter, owner))
        path = disk.path_of(self.path, name)
        return Published(name, summary_of(adapter), path, self._rules, owner, Stamp.of(path))

    def keep(self, held: Published, adapter: Adapter) -> None:
        """Makes durable what a name has already, unless its file is as it would be written now."""
        data = to_sealed_bytes(adapter, held.owner)
        with contextlib.suppress(InvalidAdapterError):
            if read_file(disk.path_of(self.path, held.name), len(data)) == data:
                return
        disk.write(self.path, held.name, data)
        held.stamp = None  # that of another file

    def remove(self, name: str) -> None:
        """Removes the file of a name; raises as `disk.remove` does."""
        disk.remove(self.path, name)

    def save_index(self, versions: Iterable[Published]) -> None:
        """Lets the next start skip the files of these versions.

        Does nothing where hardly any file would be skipped that is not skipped already.
        """
        entries = {
            published.name: Entry(published.stamp, published.summary, published.owner)
            for published in versions
            if published.stamp is not None
        }
        fresh = {(name, entry.stamp) for name, entry in entries.items()}
        if len(fresh - self._indexed) >= _MANY:
            write_index(self.path, self._rules.base_fingerprint, entries)
            self._indexed = fresh

    def _open(self, path: Path, index: Mapping[str, Entry]) -> Published | Unusable:
        name = path.relative_to(self.path).as_posix().removesuffix(SUFFIX)
        try:
            check_name(name)
            return self._known(name, path, index.get(name)) or self._read(name, path)
        except RedmuxError as err:
            logger.error("adapter file %s cannot be used: %s", path, err)
            return self._set_aside(name, path)

    def _known(self, name: str, path: Path, entry: Entry | None) -> Published | None:
        """Returns what the index has of a file, if that is still the same and would be accepted."""
        stamp = Stamp.of(path)
        if entry is not None and entry.stamp == stamp:
            with contextlib.suppress(RedmuxError):
                self._rules.check(entry.summary.config)
                return Published(name, entry.summary, path, self._rules, entry.owner, stamp)
        return None

    def _read(self, name: str, path: Path) -> Published:
        read_at_ns, stamp = time.time_ns(), Stamp.of(path)
        data = read_file(path, self._rules.limits.file_bytes)
        summary, owner = self._rules.summarize(data, None), owner_in(data) or OPERATOR
        # One more write right now might leave the stamp as it is: clocks of files are coarse.
        is_settled = stamp is not None and stamp.changed_ns < read_at_ns - _SETTLED_NS
        return Published(name, summary, path, self._rules, owner, stamp if is_settled else None)

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
                f"the stored file of adapter {name!r} is damaged; put the adapter again"
            )
            return Unusable(name, path, owner, error)
        except RedmuxError as err:
            reason = err.message
        return Unusable(
            name, path, owner,
            FailedPreconditionError(f"the stored adapter {name!r} cannot be used: {reason}"),
        )  # fmt: skip
