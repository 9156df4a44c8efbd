"""AdapterRegistry: which adapters are published under which names."""

import asyncio
import functools
import itertools
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress

from sqlalchemy import Connection

from redmux._nearest import nearest
from redmux.errors import (
    DataLossError,
    FailedPreconditionError,
    NotFoundError,
    PermissionDeniedError,
    RedmuxError,
)
from redmux_adapters import Adapter, PromptFormat, to_bytes
from redmux_adapters.format.head import KINDS
from redmux_server.registry import catalogue, changes
from redmux_server.registry.catalogue import Alias, Version
from redmux_server.registry.database import Database
from redmux_server.registry.folder import FolderChanges
from redmux_server.registry.given import GivenAdapter
from redmux_server.registry.host_cache import HostCache
from redmux_server.registry.kept import KeptVersions
from redmux_server.registry.local import LocalAdapters
from redmux_server.registry.names import (
    Reference,
    check_alias,
    check_name,
    near_name,
    parse_reference,
)
from redmux_server.registry.published import Published, rules_of
from redmux_server.registry.tenants import OPERATOR, may_change
from redmux_server.registry.unusable import Unusable

logger = logging.getLogger(__name__)

_NEIGHBOURS = 8  # of a name that is not there, from each place where there may be some


class AdapterRegistry:
    """Names of adapters and their versions, in a database, and beside it what only this server has.

    Belongs to the event loop. A name that nobody uses costs no memory here: it is looked up in the
    database, and vectors are read when they are needed. Versions are immutable: a request that
    resolved a name keeps the version it got. An acknowledged change is as durable as the database.

    Every name has an owner (see `tenants`). What a tenant may not see is not there for it; what it
    sees of the operator's it may use, not change. The tenant "" may do everything.
    """

    def __init__(
        self,
        base_fingerprint: str,
        sites: Mapping[str, int],
        database: Database | None = None,
        cache_bytes: int = 256 << 20,
        head_size: int = 0,
        head_kinds: Collection[str] = KINDS,
        check_format: Callable[[PromptFormat | None], None] = lambda prompt_format: None,
        allow_other_base: bool = False,
        has_windows: bool = True,
    ) -> None:
        """Without a `database` everything is kept in memory. Reads from it, which blocks.

        `cache_bytes` bounds the adapters that are kept ready beside those in use. `head_size` is
        the hidden size that heads of adapters are for, 0 where none are applied, and `head_kinds`
        are those that the base model can have. `check_format` raises WrongBaseError for a prompt
        format whose special tokens the base's tokenizer has not; from any thread. With
        `allow_other_base`, adapters of relatives are taken: of bases with other weights in modules
        of the same sizes; with `has_windows`, those that edit some of the tokens alone.
        """
        self._database = database or Database.in_memory()
        self._local = LocalAdapters()
        self._cache = HostCache(cache_bytes)
        self.rules = rules_of(
            base_fingerprint,
            sites,
            head_size,
            head_kinds,
            check_format,
            allow_other_base,
            has_windows,
        )
        self._kept = KeptVersions(self._database, self.rules)
        self._num_kept = self._database.read_now(functools.partial(catalogue.count, tenant=""))
        logger.info("%d adapters are kept in %s", self._num_kept, self._database.place)

    @property
    def max_file_bytes(self) -> int:
        """Size of the largest file that an adapter of this base can have."""
        return self.rules.limits.file_bytes

    def __len__(self) -> int:
        """Returns how many names there are, as of this server's last change."""
        return self._num_kept + len(self._local)

    async def has(self, name: str) -> bool:
        """Whether a name is taken, by whomever."""
        return bool(await self.owners([name]))

    async def owners(self, names: Iterable[str]) -> dict[str, str]:
        """Returns the owner of each of these names that is taken."""
        names = list(names)
        kept = await self._database.read(functools.partial(catalogue.owners, names=names))
        held = ((name, self._local.held(name)) for name in names)
        return {name: item.owner or OPERATOR for name, item in held if item is not None} | kept

    async def count(self, tenant: str = "") -> int:
        """Returns how many adapters a tenant sees."""
        kept = await self._database.read(functools.partial(catalogue.count, tenant=tenant))
        return kept + self._local.count(tenant)

    async def resolve(self, reference: str, tenant: str = "") -> Published:
        """Returns the version that is meant right now; raises NotFoundError.

        `reference` is a name, for its newest version; a name, "@" and a number, an alias or 8 or
        more digits of a digest; or a whole "sha256:..." digest, of several names with it the one
        that has had it longest. Raises FailedPreconditionError for what is not for this base model,
        and for a file of the adapter folder that is damaged DataLossError.
        """
        parsed = parse_reference(reference)
        version = await self._kept.find(parsed, tenant)
        if version is None:
            found = self._local.find(parsed, tenant)
            if found is None:
                raise await self._not_found(reference, parsed, tenant)
            return found
        try:
            return self._kept.published(version)
        except FailedPreconditionError:
            found = self._local.find(parsed, tenant)
            if found is None:
                raise
            return found

    async def fetch(self, published: Published) -> Adapter:
        """Returns the adapter of a version that was resolved, reading its vectors if need be.

        Raises as `Published.read` does.
        """
        return await self._cache.get(published)

    def ready(self, digest: str) -> Adapter | None:
        """Returns the adapter of a digest if it is in memory; ask only for what may be seen."""
        return self._cache.find(digest)

    def keep(self, adapter: Adapter) -> None:
        """Keeps an adapter in memory as those that were used last are, published or not."""
        self._cache.add(adapter)

    async def file(self, reference: str, tenant: str = "") -> tuple[Published, bytes]:
        """Returns the version that is meant and its file; raises as `resolve` and `fetch` do.

        PermissionDeniedError for a tenant where it is the operator's.
        """
        published = await self.resolve(reference, tenant)
        if not may_change(tenant, published.owner):
            raise PermissionDeniedError(
                f"adapter {published.name!r} is the operator's, whose file only the admin key reads"
            )
        return published, to_bytes(await self.fetch(published))

    async def page(self, after: str, size: int, tenant: str = "") -> list[Published]:
        """Returns up to `size` adapters, the newest version of each, whose names sort after that.

        Those that are not for this base model are left out.
        """
        found = {published.name: published for published in self._local.page(after, size, tenant)}
        num_kept, start = 0, after
        while num_kept < size:
            read = functools.partial(catalogue.page, after=start, size=size, tenant=tenant)
            kept = await self._database.read(read)
            for version in kept:
                with suppress(FailedPreconditionError):
                    found[version.name] = self._kept.published(version)
                    num_kept += 1
            if len(kept) < size:
                break
            start = kept[-1].name
        return [found[name] for name in sorted(found)[:size]]

    async def versions(self, name: str, below: int, size: int, tenant: str = "") -> list[Published]:
        """Returns up to `size` versions of a name, the newest first, numbered below that (0: all).

        Raises as `resolve` does.
        """
        newest = await self.resolve(check_name(name), tenant)
        if not newest.number:
            return [newest]
        read = functools.partial(catalogue.versions_of, name=name, below=below, size=size)
        return [self._kept.published(v, is_checked=False) for v in await self._database.read(read)]

    async def aliases(self, names: Iterable[str]) -> Mapping[str, Sequence[Alias]]:
        """Returns the aliases of each of these names that has some."""
        return await self._database.read(functools.partial(catalogue.aliases_of, names=names))

    def operators_names(self, digest: str) -> list[str]:
        """Returns the names, of those used last, that the operator has for a digest."""
        used = itertools.chain(self._kept.recent, self._local)
        same = {p.name for p in used if p.digest == digest and p.owner == OPERATOR}
        return sorted(same)

    def check_may_put(self, name: str, owner: str | None, replace: bool, tenant: str) -> None:
        """Raises unless a tenant may put something under a name that this owner has.

        See `changes.check_may_put`; and FailedPreconditionError where the adapter folder has a file
        of that name, which is not the server's to change.
        """
        changes.check_may_put(name, owner, replace, tenant)
        if _is_file(self._local.held(name)):
            raise _is_in_folder(name)

    async def put(
        self, name: str, safetensors: bytes, config_json: str, replace: bool, tenant: str = ""
    ) -> tuple[Published, bool]:
        """Checks an adapter and makes it the newest version; returns it and whether it was not so.

        The same vectors with other metadata are published as a new version that needs no
        `replace`, since they compute the same. Raises InvalidAdapterError, WrongBaseError,
        FailedPreconditionError for a head that the base model cannot have, what `check_may_put`
        raises, AlreadyExistsError where the name holds other content and `replace` is false, or,
        with the reason, what a database refuses. Nothing is published then.
        """
        check_name(name)
        owners = await self.owners([name])
        self.check_may_put(name, owners.get(name), replace, tenant)
        adapter, new = await asyncio.to_thread(self._kept.checked, safetensors, config_json)
        given = self._local.held(name)
        is_same = isinstance(given, Published) and given.digest == new.digest
        if isinstance(given, Published) and not (is_same or replace):
            raise changes.other_content(name, given.digest)
        version, is_new = await self._database.write(
            functools.partial(changes.put, name=name, new=new, replace=replace, tenant=tenant)
        )
        await self._count_again(is_new and version.number == 1)
        self._local.discard(name)
        published = self._kept.published(version)
        self._cache.add(adapter)
        if is_same and isinstance(given, Published):
            is_new = given.summary.config.metadata != adapter.metadata
        if is_new:
            logger.info("adapter %s of %s is %s, %d sites, base: %s", version.label,
                        version.owner or "the operator", adapter.digest, len(adapter.edits),
                        published.base_match)  # fmt: skip
        return published, is_new

    async def delete(self, reference: str, tenant: str = "") -> Published:
        """Removes a name with all its versions, or one version; returns the newest of them.

        Raises NotFoundError if there is none, PermissionDeniedError for a tenant where it is the
        operator's, FailedPreconditionError where an alias points there or it is a file of the
        adapter folder, and what a database refuses.
        """
        parsed = parse_reference(reference)
        found = await self._kept.find(parsed, tenant)
        if found is None:
            return await self._delete_local(reference, parsed, tenant)
        published = self._kept.published(found, is_checked=False)

        def remove(connection: Connection) -> tuple[list[Version], bool]:
            gone = changes.doomed(connection, parsed, tenant)
            for version in gone:
                live = published if version == found else self._kept.recent.live(version.id)
                if live is not None:
                    with suppress(DataLossError):  # lost with or without what comes next
                        live.detach(catalogue.blob(connection, version))
            return gone, bool(gone) and changes.remove(connection, gone, tenant)

        gone, is_last = await self._database.write(remove)
        if not gone:
            raise await self._not_found(reference, parsed, tenant)
        await self._count_again(-is_last)
        for version in gone:
            self._kept.recent.forget(version.id)
        logger.info("adapter %s of %s is deleted", published.name if parsed.is_name else
                    published.reference, published.owner or "the operator")  # fmt: skip
        return published

    async def set_alias(self, name: str, alias: str, version: str, tenant: str = "") -> Published:
        """Points an alias at a version, which it returns; in one step if it pointed elsewhere.

        `version` is what a reference has behind its "@". Raises NotFoundError for a version that is
        not there, PermissionDeniedError where the adapter is the operator's.
        """
        check_alias(alias)
        target = await self._on_version(
            f"{check_name(name)}@{version}", tenant, changes.set_alias, alias
        )
        logger.info("alias %s of adapter %s is version %d", alias, name, target.number)
        return self._kept.published(target, is_checked=False)

    async def delete_alias(self, name: str, alias: str, tenant: str = "") -> None:
        """Removes an alias; raises as `set_alias` does."""
        await self._on_version(check_name(name), tenant, changes.delete_alias, check_alias(alias))
        logger.info("alias %s of adapter %s is deleted", alias, name)

    def load(self, given: GivenAdapter) -> Published | None:
        """Publishes an adapter that was given at start; raises as `put` does, naming its path.

        Its bytes are kept in memory: the file is not the server's and may change. Returns None
        where the registry has the name, since that was put later. Blocks.
        """
        try:
            summary = self.rules.summarize(given.safetensors, given.config_json)
        except RedmuxError as err:
            raise given.blamed(err) from None
        kept = self._database.read_now(functools.partial(catalogue.latest, name=given.name))
        if kept is not None:
            with suppress(FailedPreconditionError):  # it is of another base model
                self._kept.published(kept)
                logger.warning("adapter %s of the option adapters is not served: the registry has "
                               "that name, and it was put later", given.name)  # fmt: skip
                return None
        published = Published(given.name, summary, given.safetensors, self.rules)
        self._local.add(published)
        logger.info("adapter %s is %s, base: %s", given.name, published.digest,
                    published.base_match)  # fmt: skip
        return published

    def follow(self, seen: FolderChanges) -> None:
        """Publishes, replaces and takes back what has come, changed and gone in a folder.

        What the registry has wins over a file of the same name.
        """
        for name in seen.gone:
            self._local.discard(name)
        for item in seen.found:
            self._local.add(item)

    async def close(self) -> None:
        """Waits for changes that are being written and lets go of the database."""
        await asyncio.to_thread(self._database.close)

    async def _count_again(self, change: int) -> None:
        """Notes how many names are kept after one of them has come (1) or gone (-1), or none."""
        if self._database.is_shared:
            read = functools.partial(catalogue.count, tenant="")
            self._num_kept = await self._database.read(read)
        else:
            self._num_kept += change

    async def _on_version(
        self, text: str, tenant: str, change: Callable[[Connection, Version, str, str], None],
        alias: str,
    ) -> Version:  # fmt: skip
        """Makes a change of an alias of the version that is meant, which it returns."""
        reference = parse_reference(text)

        def run(connection: Connection) -> Version | None:
            found = catalogue.find(connection, reference, tenant)
            if found is not None:
                change(connection, found, alias, tenant)
            return found

        found = await self._database.write(run)
        if found is not None:
            return found
        if self._local.find(Reference(reference.name), tenant) is not None:
            raise FailedPreconditionError(
                f"adapter {reference.name!r} was given at start or is a file of the server's, with "
                "one version and no aliases; put it to the registry"
            )
        raise await self._not_found(text, reference, tenant)

    async def _delete_local(self, text: str, reference: Reference, tenant: str) -> Published:
        found = self._local.find(reference, tenant)
        if found is None or not reference.name:
            raise await self._not_found(text, reference, tenant)
        if not may_change(tenant, found.owner):
            raise changes.belongs_to_operator(found.name)
        if _is_file(found):
            raise _is_in_folder(found.name)
        self._local.discard(found.name)
        logger.info(
            "adapter %s of the option adapters is deleted, until the next start", found.name
        )
        return found

    async def _not_found(self, text: str, reference: Reference, tenant: str) -> NotFoundError:
        """Returns the error for what a tenant does not see, with a near name that it sees."""
        shown, name = text[:160], near_name(text)
        if reference.name and not reference.is_name:
            with suppress(RedmuxError):
                newest = await self.resolve(reference.name, tenant)
                return NotFoundError(
                    f"adapter {newest.name!r} has no version {shown.partition('@')[2]!r}; its "
                    f"newest is {newest.number or newest.digest}"
                )
        read = functools.partial(catalogue.neighbours, name=name, size=_NEIGHBOURS, tenant=tenant)
        known = [
            *await self._database.read(read),
            *self._local.neighbours(name, _NEIGHBOURS, tenant),
        ]
        near = nearest(name, known)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return NotFoundError(f"no adapter {shown!r}; {hint}see ListAdapters")


def _is_file(local: Published | Unusable | None) -> bool:
    """Whether this is a file of the adapter folder."""
    return isinstance(local, Unusable) or (local is not None and local.stamp is not None)


def _is_in_folder(name: str) -> FailedPreconditionError:
    return FailedPreconditionError(
        f"adapter {name!r} is a file of the server's adapter folder, which it only reads; change "
        "the file there, or put yours under another name"
    )
