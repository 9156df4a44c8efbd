"""AdapterRegistry: which adapters are published under which names."""

import asyncio
import difflib
import logging
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from redmux.errors import (
    AlreadyExistsError,
    InvalidArgumentError,
    NotFoundError,
    RedmuxError,
)
from redmux_adapters import Adapter, Limits, check_base, parse_adapter, read_adapter, to_bytes

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}(/[a-z0-9][a-z0-9._-]{0,63})?")
_SUFFIX = ".safetensors"
_HEADER_BYTES = 512 << 10


@dataclass(frozen=True, slots=True)
class Published:
    """An adapter under its name."""

    name: str
    adapter: Adapter
    created_at: datetime


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

    Belongs to the event loop. Publishing swaps one reference: a request that resolved a name
    before keeps the adapter it got. With a folder, an acknowledged change is on disk: each
    adapter is one file, written beside its place, synced and renamed.
    """

    def __init__(
        self, base_fingerprint: str, sites: Mapping[str, int], folder: Path | None = None
    ) -> None:
        self._base_fingerprint = base_fingerprint
        self._sites = sites
        self._folder = folder
        self._by_name: dict[str, Published] = {}
        self._writing = asyncio.Lock()
        # Every editable module in fp32, and room for the header.
        self.max_file_bytes = 8 * sum(sites.values()) + _HEADER_BYTES
        self._limits = Limits(
            file_bytes=self.max_file_bytes, header_bytes=_HEADER_BYTES,
            num_tensors=2 * len(sites),
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self._by_name)

    def resolve(self, name_or_digest: str) -> Published:
        """Returns the adapter of a name or a "sha256:..." digest; raises NotFoundError."""
        found = self._by_name.get(name_or_digest)
        if found is None and name_or_digest.startswith("sha256:"):
            found = next(
                (p for p in self._by_name.values() if p.adapter.digest == name_or_digest), None
            )
        if found is None:
            raise self._not_found(name_or_digest)
        return found

    def page(self, after: str, size: int) -> list[Published]:
        """Returns up to `size` adapters whose names sort after `after`."""
        names = sorted(name for name in self._by_name if name > after)
        return [self._by_name[name] for name in names[:size]]

    async def put(
        self, name: str, safetensors: bytes, config_json: str, replace: bool
    ) -> tuple[Published, bool]:
        """Checks and publishes an adapter; returns it and whether anything changed.

        Raises InvalidAdapterError, WrongBaseError, or AlreadyExistsError where the name holds
        other content and `replace` is false. Nothing is published then.
        """
        check_name(name)
        adapter = await asyncio.to_thread(self._parse, safetensors, config_json)
        # A caller who goes away must not leave the file to be written after the lock is free.
        return await asyncio.shield(self._publish(name, adapter, replace))

    async def _publish(self, name: str, adapter: Adapter, replace: bool) -> tuple[Published, bool]:
        async with self._writing:
            held = self._by_name.get(name)
            if held is not None and held.adapter.digest == adapter.digest:
                await self._keep(held)
                return held, False
            if held is not None and not replace:
                raise AlreadyExistsError(
                    f"adapter {name!r} exists with other content ({held.adapter.digest}); "
                    f"pass replace to replace it"
                )
            published = Published(name, adapter, datetime.now(UTC))
            if self._folder is not None:
                await asyncio.to_thread(_write, self._folder, published)
            self._by_name[name] = published
        logger.info("adapter %s is %s, %d sites", name, adapter.digest, len(adapter.edits))
        return published, True

    async def delete(self, name: str) -> Published:
        """Removes a name; raises NotFoundError if there is none."""
        return await asyncio.shield(self._remove(name))

    async def _remove(self, name: str) -> Published:
        async with self._writing:
            if name not in self._by_name:
                raise self._not_found(name)
            if self._folder is not None:
                await asyncio.to_thread(_unlink, self._folder, name)
            logger.info("adapter %s is deleted", name)
            return self._by_name.pop(name)

    def load(self, path: Path, name: str) -> Published:
        """Publishes the adapter of a local file or folder, at start; raises as `put` does."""
        check_name(name)
        adapter = read_adapter(path, expected_sites=self._sites, limits=self._limits)
        check_base(adapter, self._base_fingerprint)
        published = Published(name, adapter, datetime.now(UTC))
        self._by_name[name] = published
        logger.info("adapter %s is %s, %d sites", name, adapter.digest, len(adapter.edits))
        return published

    def load_folder(self) -> list[Path]:
        """Publishes what earlier runs kept; returns the files that cannot be used, which stay.

        Names from here win over those loaded before: they were put later.
        """
        assert self._folder is not None
        self._folder.mkdir(parents=True, exist_ok=True)
        for leftover in self._folder.glob("**/.*.tmp"):
            if leftover.is_file():
                leftover.unlink()
        unusable = []
        for path in sorted(self._folder.glob(f"**/*{_SUFFIX}")):
            name = path.relative_to(self._folder).as_posix().removesuffix(_SUFFIX)
            try:
                self.load(path, name)
            except RedmuxError as err:
                logger.error("adapter file %s cannot be used: %s", path, err)
                unusable.append(path)
        return unusable

    async def _keep(self, held: Published) -> None:
        """Writes the file of an adapter that was loaded from elsewhere and has none yet."""
        if self._folder is not None and not _path(self._folder, held.name).is_file():
            await asyncio.to_thread(_write, self._folder, held)

    def _parse(self, safetensors: bytes, config_json: str) -> Adapter:
        adapter = parse_adapter(
            safetensors, config_json, expected_sites=self._sites, limits=self._limits
        )
        check_base(adapter, self._base_fingerprint)
        return adapter

    def _not_found(self, name: str) -> NotFoundError:
        near = difflib.get_close_matches(name[:128], self._by_name, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return NotFoundError(
            f"no adapter {name[:128]!r}{hint} {len(self)} loaded, see ListAdapters"
            if hint
            else f"no adapter {name[:128]!r}; {len(self)} loaded, see ListAdapters"
        )


def _path(folder: Path, name: str) -> Path:
    return folder / f"{name}{_SUFFIX}"


def _write(folder: Path, published: Published) -> None:
    path = _path(folder, published.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(suffix=".tmp", prefix=".", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(to_bytes(published.adapter))
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
