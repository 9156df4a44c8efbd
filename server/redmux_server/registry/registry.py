"""AdapterRegistry: which adapters are published under which names."""

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from redmux.errors import (
    AlreadyExistsError,
    NotFoundError,
    PermissionDeniedError,
    RedmuxError,
)
from redmux_adapters import Adapter, Limits, PromptFormat
from redmux_adapters.format.files import summary_of
from redmux_adapters.format.head import KINDS, MAX_LABELS
from redmux_server.registry.catalogue import Catalogue
from redmux_server.registry.folder import AdapterFolder, Unusable
from redmux_server.registry.given import GivenAdapter
from redmux_server.registry.host_cache import HostCache
from redmux_server.registry.names import check_name
from redmux_server.registry.published import Published, Rules
from redmux_server.registry.tenants import OPERATOR, may_change, may_see, owner_of_new

logger = logging.getLogger(__name__)

_HEADER_BYTES = 512 << 10
_HEAD_TENSORS = max(map(len, KINDS.values()))


class AdapterRegistry:
    """Names of immutable adapters, in memory, and in a folder if one is given.

    Belongs to the event loop. A name costs a few kilobytes: vectors that nobody uses stay in their
    file, or in the bytes they came in where there is no folder. Publishing swaps one reference: a
    request that resolved a name before keeps the version it got. With a folder, an acknowledged
    change is on disk: each adapter is one file, written beside its place, synced and renamed.

    Every name has an owner (see `tenants`). What a tenant may not see is not there for it; what it
    sees of the operator's it may use, not change. The tenant "" may do everything.
    """

    def __init__(
        self,
        base_fingerprint: str,
        sites: Mapping[str, int],
        folder: Path | None = None,
        cache_bytes: int = 256 << 20,
        head_size: int = 0,
        head_kinds: Collection[str] = KINDS,
        check_format: Callable[[PromptFormat | None], None] = lambda prompt_format: None,
        allow_other_base: bool = False,
        has_windows: bool = True,
    ) -> None:
        """`cache_bytes` bounds the adapters that are kept ready beside those in use.

        `head_size` is the hidden size that heads of adapters are for, 0 where none are applied, and
        `head_kinds` are those that the base model can have. `check_format` raises WrongBaseError
        for a prompt format whose special tokens the base's tokenizer has not; from any thread. With
        `allow_other_base`, adapters of relatives are taken: of bases with other weights in modules
        of the same sizes; with `has_windows`, those that edit some of the tokens alone.
        """
        self._catalogue = Catalogue()
        self._unusable: dict[str, Unusable] = {}  # names that are not in the catalogue
        self._cache = HostCache(cache_bytes)
        self._writing = asyncio.Lock()
        # Every editable module and the largest head in fp32, and room for the header.
        num_head_values = (head_size + 1) * (head_size + MAX_LABELS) if head_size else 0
        num_values = 2 * sum(sites.values()) + num_head_values
        self.max_file_bytes = 4 * num_values + _HEADER_BYTES
        limits = Limits(
            file_bytes=self.max_file_bytes, header_bytes=_HEADER_BYTES,
            num_tensors=2 * len(sites) + (_HEAD_TENSORS if head_size else 0),
        )  # fmt: skip
        self._rules = Rules(
            base_fingerprint,
            sites,
            limits,
            head_size,
            head_kinds,
            check_format,
            allow_other_base,
            has_windows,
        )
        self._folder = None if folder is None else AdapterFolder(folder, self._rules)

    def __len__(self) -> int:
        return len(self._catalogue)

    def __contains__(self, name: str) -> bool:
        return self._catalogue.held(name) is not None

    def count(self, tenant: str = "") -> int:
        """Returns how many adapters a tenant sees."""
        return self._catalogue.count(tenant)

    def resolve(self, name_or_digest: str, tenant: str = "") -> Published:
        """Returns the version that a name or a "sha256:..." digest has now; raises NotFoundError.

        Of several names with that digest, the one that has had it longest. For a name whose file
        was found damaged at start it raises DataLossError, for one whose file is not for this base
        model FailedPreconditionError.
        """
        unusable = self._unusable.get(name_or_digest)
        if unusable is not None and may_see(tenant, unusable.owner):
            raise unusable.fresh_error()
        return self._catalogue.resolve(name_or_digest, tenant)

    async def fetch(self, published: Published) -> Adapter:
        """Returns the adapter of a version that was resolved, reading its vectors if need be.

        Raises DataLossError if its file was damaged since it was published.
        """
        return await self._cache.get(published)

    def page(self, after: str, size: int, tenant: str = "") -> list[Published]:
        """Returns up to `size` adapters whose names sort after `after`."""
        return self._catalogue.page(after, size, tenant)

    def operators_names(self, digest: str) -> list[str]:
        """Returns the names that the operator has for a digest."""
        return self._catalogue.names_of(digest, OPERATOR)

    def check_may_put(self, name: str, replace: bool, tenant: str) -> None:
        """Raises unless a tenant may put something under a name, as far as owners are concerned.

        PermissionDeniedError for a name of the operator's; for another tenant's NotFoundError if it
        is to be replaced, else AlreadyExistsError: that it is taken cannot be hidden.
        """
        known, owner = self._owner(name)
        if not known or may_change(tenant, owner):
            return
        if may_see(tenant, owner):
            raise _belongs_to_operator(name)
        if replace:
            raise NotFoundError(f"no adapter {name!r} to replace; choose another name")
        raise AlreadyExistsError(f"the name {name!r} is taken; choose another")

    async def put(
        self, name: str, safetensors: bytes, config_json: str, replace: bool, tenant: str = ""
    ) -> tuple[Published, bool]:
        """Checks and publishes an adapter; returns it and whether anything changed.

        The same vectors with other metadata are published as a new version that needs no
        `replace`, since they compute the same. Raises InvalidAdapterError, WrongBaseError,
        FailedPreconditionError for a head that the base model cannot have, what `check_may_put`
        raises, AlreadyExistsError where the name holds other content and `replace` is false, or,
        with the reason, ResourceExhaustedError or FailedPreconditionError where the folder does
        not take it. Nothing is published then.
        """
        check_name(name)
        self.check_may_put(name, replace, tenant)
        adapter = await asyncio.to_thread(self._rules.parse, safetensors, config_json)
        # A caller who goes away must not leave the file to be written after the lock is free.
        return await asyncio.shield(self._publish(name, adapter, safetensors, replace, tenant))

    async def _publish(
        self, name: str, adapter: Adapter, safetensors: bytes, replace: bool, tenant: str
    ) -> tuple[Published, bool]:
        async with self._writing:
            self.check_may_put(name, replace, tenant)  # somebody may have been faster
            held = self._catalogue.held(name)
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
                if self._folder is not None:
                    await asyncio.to_thread(self._folder.keep, held, adapter)
                return held, False
            _, owner = self._owner(name)
            if owner is None:
                owner = owner_of_new(tenant)
            published = await asyncio.to_thread(
                self._store, name, adapter, safetensors, held, owner
            )
            self._catalogue.add(published)
            self._unusable.pop(name, None)
        logger.info("adapter %s of %s is %s, %d sites, base: %s", name, owner or "the operator",
                    adapter.digest, len(adapter.edits), published.base_match)  # fmt: skip
        return published, True

    async def delete(self, name: str, tenant: str = "") -> Published:
        """Removes a name; raises NotFoundError if there is none.

        PermissionDeniedError for a tenant where it is the operator's; and as `put` does where the
        folder cannot be changed.
        """
        return await asyncio.shield(self._remove(name, tenant))

    async def _remove(self, name: str, tenant: str) -> Published:
        async with self._writing:
            held = self._catalogue.held(name)
            if held is None or not may_see(tenant, held.owner):
                self.resolve(name, tenant)  # raises, but for a digest
                raise self._catalogue.not_found(name, tenant)
            if not may_change(tenant, held.owner):
                raise _belongs_to_operator(name)
            if self._folder is not None:
                await asyncio.to_thread(held.detach)
                await asyncio.to_thread(self._folder.remove, name)
            self._catalogue.discard(held)
            logger.info("adapter %s of %s is deleted", name, held.owner or "the operator")
            return held

    def load(self, given: GivenAdapter) -> Published:
        """Publishes an adapter that was given at start; raises as `put` does, naming its path.

        Its bytes are kept in memory: the file is not the registry's and may change.
        """
        try:
            summary = self._rules.summarize(given.safetensors, given.config_json)
        except RedmuxError as err:
            raise given.blamed(err) from None
        published = Published(given.name, summary, given.safetensors, self._rules)
        self._catalogue.add(published)
        logger.info("adapter %s is %s, base: %s", given.name, published.digest,
                    published.base_match)  # fmt: skip
        return published

    def load_folder(self) -> list[Path]:
        """Publishes what earlier runs kept; returns the files that cannot be used, which stay.

        Names from here win over those given at start: they were put later. That holds for damaged
        files, too, lest a name silently becomes something else.
        """
        assert self._folder is not None
        found = self._folder.open_all()
        bad = [item for item in found if isinstance(item, Unusable)]
        for item in found:
            given = self._catalogue.held(item.name)
            if given is not None:
                if isinstance(item, Unusable) and not item.is_damaged:
                    continue  # it is of another base model
                logger.warning("adapter %s of the option adapters is not served: %s has that name "
                               "and was put later", item.name, self._folder.path)  # fmt: skip
                self._catalogue.discard(given)
            if isinstance(item, Unusable):
                self._unusable[item.name] = item
            else:
                self._catalogue.add(item)
        logger.info("%d of %d adapter files in %s are usable", len(found) - len(bad), len(found),
                    self._folder.path)  # fmt: skip
        self.save_index()
        return [item.path for item in bad]

    def save_index(self) -> None:
        """Lets the next start skip the files of today; blocks on the disk for a moment."""
        if self._folder is not None:
            self._folder.save_index(self._catalogue.versions())

    async def close(self) -> None:
        """Waits for changes that are being written, then saves the index; call it at the end.

        Until then the folder is still this registry's, whoever has given up waiting for them.
        """
        async with self._writing:
            await asyncio.to_thread(self.save_index)

    def _store(
        self, name: str, adapter: Adapter, safetensors: bytes, held: Published | None, owner: str
    ) -> Published:
        """Makes an adapter durable, if there is a folder, in place of the version `held`."""
        if self._folder is None:
            return Published(name, summary_of(adapter), safetensors, self._rules, owner)
        if held is not None:
            held.detach()
        return self._folder.store(name, adapter, owner)

    def _owner(self, name: str) -> tuple[bool, str | None]:
        """Returns whether a name is taken, and by whom; None where nobody knows."""
        held = self._catalogue.held(name) or self._unusable.get(name)
        return held is not None, None if held is None else held.owner


def _belongs_to_operator(name: str) -> PermissionDeniedError:
    return PermissionDeniedError(
        f"adapter {name!r} is the operator's, which only the admin key may change; put yours under "
        "another name"
    )
