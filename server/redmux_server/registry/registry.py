"""AdapterRegistry: which adapters are published under which names."""

import asyncio
import bisect
import contextlib
import difflib
import logging
import os
import re
import tempfile
import time
from collections.abc import Collection, Mapping
from pathlib import Path

from redmux.errors import (
    AlreadyExistsError,
    DataLossError,
    InvalidArgumentError,
    NotFoundError,
    RedmuxError,
)
from redmux_adapters import Adapter, Limits, Summary, parse_adapter, summarize, to_bytes
from redmux_adapters.format.files import read_file, read_parts, summary_of
from redmux_adapters.format.head import KINDS, MAX_LABELS
from redmux_server.registry.folder_index import Entry, Stamp, read_index, write_index
from redmux_server.registry.host_cache import HostCache
from redmux_server.registry.published import Published, Rules

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}(/[a-z0-9][a-z0-9._-]{0,63})?")
_SUFFIX = ".safetensors"
_HEADER_BYTES = 512 << 10
_HEAD_TENSORS = max(map(len, KINDS.values()))
_NEIGHBOURS = 64
_MANY = 64  # files; reading fewer takes milliseconds
_SETTLED_NS = 2_000_000_000


def check_name(name: str) -> str:
    """Returns the name, or raises InvalidArgumentError if it is none."""
    # A first part that ends like a file would be a folder where another adapter's file goes.
    if not _NAME.fullmatch(name) or f"{_SUFFIX}/" in name:
        raise InvalidArgumentError(
            f"adapter name {name[:80]!r} is not valid: one or two parts joined by '/', each of "
            f"a-z, 0-9, '.', '_', '-', at most 64 long, starting with a letter or digit, "
            f"the first of two not ending in {_SUFFIX}"
        )
    return name


class AdapterRegistry:
    """Names of immutable adapters, in memory, and in a folder if one is given.

    Belongs to the event loop. A name costs a few kilobytes: vectors that nobody uses stay in their
    file, or in the bytes they came in where there is no folder. Publishing swaps one reference: a
    request that resolved a name before keeps the version it got. With a folder, an acknowledged
    change is on disk: each adapter is one file, written beside its place, synced and renamed.
    """

    def __init__(
        self,
        base_fingerprint: str,
        sites: Mapping[str, int],
        folder: Path | None = None,
        cache_bytes: int = 256 << 20,
        head_size: int = 0,
        head_kinds: Collection[str] = KINDS,
    ) -> None:
        """`cache_bytes` bounds the adapters that are kept ready beside those in use.

        `head_size` is the hidden size that heads of adapters are for, 0 where none are applied, and
        `head_kinds` are those that the base model can have.
        """
        self._base_fingerprint = base_fingerprint
        self._folder = folder
        self._by_name: dict[str, Published] = {}
        self._by_digest: dict[str, dict[str, Published]] = {}  # digest -> name -> version
        self._names: list[str] = []  # sorted
        self._cache = HostCache(cache_bytes)
        self._indexed: set[tuple[str, Stamp]] = set()  # files that the folder's index has
        self._writing = asyncio.Lock()
        # Every editable module and the largest head in fp32, and room for the header.
        num_head_values = (head_size + 1) * (head_size + MAX_LABELS) if head_size else 0
        num_values = 2 * sum(sites.values()) + num_head_values
        self.max_file_bytes = 4 * num_values + _HEADER_BYTES
        self._limits = Limits(
            file_bytes=self.max_file_bytes, header_bytes=_HEADER_BYTES,
            num_tensors=2 * len(sites) + (_HEAD_TENSORS if head_size else 0),
        )  # fmt: skip
        self._rules = Rules(base_fingerprint, sites, self._limits, head_size, head_kinds)

    def __len__(self) -> int:
        return len(self._by_name)

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def resolve(self, name_or_digest: str) -> Published:
        """Returns the version that a name or a "sha256:..." digest has now; raises NotFoundError.

        Of several names with that digest, the one that has had it longest.
        """
        found = self._by_name.get(name_or_digest)
        if found is None and name_or_digest in self._by_digest:
            found = next(iter(self._by_digest[name_or_digest].values()))
        if found is None:
            raise self._not_found(name_or_digest)
        return found

    async def fetch(self, published: Published) -> Adapter:
        """Returns the adapter of a version that was resolved, reading its vectors if need be.

        Raises DataLossError if its file was damaged since it was published.
        """
        return await self._cache.get(published)

    def page(self, after: str, size: int) -> list[Published]:
        """Returns up to `size` adapters whose names sort after `after`."""
        start = bisect.bisect_right(self._names, after)
        return [self._by_name[name] for name in self._names[start : start + size]]

    async def put(
        self, name: str, safetensors: bytes, config_json: str, replace: bool
    ) -> tuple[Published, bool]:
        """Checks and publishes an adapter; returns it and whether anything changed.

        The same vectors with other metadata are published as a new version that needs no
        `replace`, since they compute the same. Raises InvalidAdapterError, WrongBaseError,
        FailedPreconditionError for a head that the base model cannot have, or AlreadyExistsError
        where the name holds other content and `replace` is false. Nothing is published then.
        """
        check_name(name)
        adapter = await asyncio.to_thread(self._parse, safetensors, config_json)
        # A caller who goes away must not leave the file to be written after the lock is free.
        return await asyncio.shield(self._publish(name, adapter, safetensors, replace))

    async def _publish(
        self, name: str, adapter: Adapter, safetensors: bytes, replace: bool
    ) -> tuple[Published, bool]:
        async with self._writing:
            held = self._by_name.get(name)
            if held is not None and held.digest != adapter.digest and not replace:
                raise AlreadyExistsError(
                    f"adapter {name!r} exists with other content ({held.digest}); "
                    f"pass replace to replace it"
                )
            self._cache.add(adapter)
            if (
                held is not None
                and held.digest == adapter.digest
                and held.summary.config.metadata == adapter.metadata
            ):
                await asyncio.to_thread(self._keep, held, adapter)
                return held, False
            published = await asyncio.to_thread(self._store, name, adapter, safetensors, held)
            self._add(published)
        logger.info("adapter %s is %s, %d sites", name, adapter.digest, len(adapter.edits))
        return published, True

    async def delete(self, name: str) -> Published:
        """Removes a name; raises NotFoundError if there is none."""
        return await asyncio.shield(self._remove(name))

    async def _remove(self, name: str) -> Published:
        async with self._writing:
            held = self._by_name.get(name)
            if held is None:
                raise self._not_found(name)
            if self._folder is not None:
                await asyncio.to_thread(held.detach)
                await asyncio.to_thread(_unlink, self._folder, name)
            self._discard(held)
            logger.info("adapter %s is deleted", name)
            return held

    def load(self, path: Path, name: str) -> Published:
        """Publishes the adapter of a local file or folder, at start; raises as `put` does.

        Its bytes are kept in memory: the file is not the registry's and may change.
        """
        check_name(name)
        data, config_json = read_parts(path, self._limits)
        published = Published(name, self._summarize(data, config_json), data, self._rules)
        self._add(published)
        logger.info("adapter %s is %s", name, published.digest)
        return published

    def load_folder(self) -> list[Path]:
        """Publishes what earlier runs kept; returns the files that cannot be used, which stay.

        Every file that changed since an earlier run indexed it is read and checked, and its vectors
        are dropped again. Names from here win over those loaded before: they were put later.
        """
        assert self._folder is not None
        self._folder.mkdir(parents=True, exist_ok=True)
        for leftover in self._folder.glob("**/.*.tmp"):
            if leftover.is_file():
                leftover.unlink()
        paths = sorted(self._folder.glob(f"**/*{_SUFFIX}"))
        index = read_index(self._folder, self._base_fingerprint)
        self._indexed = {(name, entry.stamp) for name, entry in index.items()}
        # Threads would take longer: most of the work needs the interpreter's lock.
        found = [self._open(path, index) for path in paths]
        for published in found:
            if published is not None:
                self._add(published)
        logger.info("%d of %d adapter files in %s are usable", len(found) - found.count(None),
                    len(found), self._folder)  # fmt: skip
        self.save_index()
        return [path for path, published in zip(paths, found, strict=True) if published is None]

    def _open(self, path: Path, index: Mapping[str, Entry]) -> Published | None:
        """Checks a file of the folder; returns None, with the reason in the log, if it is bad."""
        assert self._folder is not None
        name = path.relative_to(self._folder).as_posix().removesuffix(_SUFFIX)
        read_at_ns, stamp = time.time_ns(), Stamp.of(path)
        known = index.get(name)
        try:
            check_name(name)
            if known is not None and known.stamp == stamp:
                self._rules.check(known.summary.config)
                return Published(name, known.summary, path, self._rules, stamp)
            summary = self._summarize(read_file(path, self._limits.file_bytes), None)
        except RedmuxError as err:
            logger.error("adapter file %s cannot be used: %s", path, err)
            return None
        # One more write right now might leave the stamp as it is: clocks of files are coarse.
        is_settled = stamp is not None and stamp.changed_ns < read_at_ns - _SETTLED_NS
        return Published(name, summary, path, self._rules, stamp if is_settled else None)

    def save_index(self) -> None:
        """Lets the next start skip the files of today; blocks on the disk for a moment.

        Does nothing where hardly any file would be skipped that is not skipped already.
        """
        if self._folder is None:
            return
        entries = {
            name: Entry(published.stamp, published.summary)
            for name, published in self._by_name.items()
            if published.stamp is not None
        }
        fresh = {(name, entry.stamp) for name, entry in entries.items()}
        if len(fresh - self._indexed) >= _MANY:
            write_index(self._folder, self._base_fingerprint, entries)
            self._indexed = fresh

    def _parse(self, safetensors: bytes, config_json: str) -> Adapter:
        rules = self._rules
        adapter = parse_adapter(
            safetensors, config_json, expected_sites=rules.expected_sites,
            hidden_size=rules.head_size or None, limits=rules.limits,
        )  # fmt: skip
        rules.check(summary_of(adapter).config)
        return adapter

    def _summarize(self, safetensors: bytes, config_json: str | None) -> Summary:
        rules = self._rules
        summary = summarize(
            safetensors, config_json, expected_sites=rules.expected_sites,
            hidden_size=rules.head_size or None, limits=rules.limits,
        )  # fmt: skip
        rules.check(summary.config)
        return summary

    def _store(
        self, name: str, adapter: Adapter, safetensors: bytes, held: Published | None
    ) -> Published:
        """Makes an adapter durable, if there is a folder, in place of the version `held`."""
        if self._folder is None:
            return Published(name, summary_of(adapter), safetensors, self._rules)
        if held is not None:
            held.detach()
        _write(self._folder, name, to_bytes(adapter))
        path = _path(self._folder, name)
        return Published(name, summary_of(adapter), path, self._rules, Stamp.of(path))

    def _keep(self, held: Published, adapter: Adapter) -> None:
        """Writes the file of a version that was loaded from elsewhere or is damaged by now."""
        if self._folder is None:
            return
        with contextlib.suppress(DataLossError):
            held.read()
            if _path(self._folder, held.name).is_file():
                return
        _write(self._folder, held.name, to_bytes(adapter))
        held.stamp = None  # that of another file

    def _add(self, published: Published) -> None:
        held = self._by_name.get(published.name)
        if held is not None:
            self._discard(held)
        bisect.insort(self._names, published.name)
        self._by_name[published.name] = published
        self._by_digest.setdefault(published.digest, {})[published.name] = published

    def _discard(self, held: Published) -> None:
        del self._names[bisect.bisect_left(self._names, held.name)]
        del self._by_name[held.name]
        same = self._by_digest[held.digest]
        del same[held.name]
        if not same:
            del self._by_digest[held.digest]

    def _not_found(self, name: str) -> NotFoundError:
        name = name[:128]
        # Comparing takes microseconds a name, so only neighbours in the order of names are asked.
        middle = bisect.bisect_left(self._names, name)
        neighbours = self._names[max(0, middle - _NEIGHBOURS) : middle + _NEIGHBOURS]
        near = difflib.get_close_matches(name, neighbours, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return NotFoundError(f"no adapter {name!r}; {hint}{len(self)} loaded, see ListAdapters")


def _path(folder: Path, name: str) -> Path:
    return folder / f"{name}{_SUFFIX}"


def _write(folder: Path, name: str, data: bytes) -> None:
    path = _path(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(suffix=".tmp", prefix=".", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).rename(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)
    if path.parent != folder:
        _sync_folder(folder)


def _unlink(folder: Path, name: str) -> None:
    path = _path(folder, name)
    path.unlink(missing_ok=True)  # an adapter that was loaded from elsewhere has no file here
    if path.parent.is_dir():
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Makes a rename or removal in this folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
