"""Catalogue: which versions are kept under which names, and who sees them. Reads only."""

import hashlib
import heapq
import itertools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from sqlalchemy import Connection, Select, and_, bindparam, func, or_, select

from redmux.errors import DataLossError, InvalidArgumentError, NotFoundError
from redmux_server.registry.names import Reference
from redmux_server.registry.schema import adapters, aliases, blobs, tenants, versions
from redmux_server.registry.tenants import OPERATOR, may_see, sees_all


class Version(NamedTuple):
    """A version as it is kept, without its vectors."""

    id: int
    adapter_id: int
    name: str
    owner: str
    number: int
    digest: str
    sha256: str
    config: str
    num_sites: int
    num_parameters: int
    num_head_parameters: int
    created_us: int

    @property
    def label(self) -> str:
        """Its name and number, for people."""
        return f"{self.name}@{self.number}"


class Alias(NamedTuple):
    """A name that stands for a version of an adapter until it is moved."""

    name: str
    number: int


_VERSIONS: Any = (
    select(
        versions.c.id, versions.c.adapter_id, adapters.c.name, tenants.c.name.label("owner"),
        versions.c.number, versions.c.digest, versions.c.sha256, versions.c.config,
        versions.c.num_sites, versions.c.num_parameters, versions.c.num_head_parameters,
        versions.c.created_us,
    )
    .join(adapters, versions.c.adapter_id == adapters.c.id)
    .join(tenants, adapters.c.tenant_id == tenants.c.id)
)  # fmt: skip
_LATEST = _VERSIONS.where(versions.c.number == adapters.c.latest)
# Made once, since making them takes as long as running them.
_LATEST_OF_NAME = _LATEST.where(adapters.c.name == bindparam("name"))
_OF_OWNER = adapters.c.tenant_id == (
    select(tenants.c.id).where(tenants.c.name == bindparam("owner")).scalar_subquery()
)
_NAMES = select(adapters.c.name).limit(bindparam("size"))
_NEIGHBOURS = (
    _NAMES.where(adapters.c.name < bindparam("name")).order_by(adapters.c.name.desc()),
    _NAMES.where(adapters.c.name >= bindparam("name")).order_by(adapters.c.name),
)
_OWNERS_NEIGHBOURS = tuple(query.where(_OF_OWNER) for query in _NEIGHBOURS)


def latest(connection: Connection, name: str) -> Version | None:
    """Returns the newest version of a name, whosever it is."""
    return _one(connection, _LATEST_OF_NAME, name=name)


def owners(connection: Connection, names: Iterable[str]) -> dict[str, str]:
    """Returns the owner of each of these names that is taken."""
    query = (
        select(adapters.c.name, tenants.c.name)
        .join(tenants, adapters.c.tenant_id == tenants.c.id)
        .where(adapters.c.name.in_(list(names)))
    )
    return {row[0]: row[1] for row in connection.execute(query)}


def find(connection: Connection, reference: Reference, tenant: str) -> Version | None:
    """Returns the version that a tenant refers to, None where there is none that it sees.

    Of several names with a digest, the one that has had it longest; of several versions of a name,
    the newest. Raises InvalidArgumentError where a digest's beginning is that of several.
    """
    if not reference.name:
        if not reference.digest:
            return None
        query = _visible(_VERSIONS.where(versions.c.digest == reference.digest), tenant)
        first = _one(connection, query.order_by(versions.c.id).limit(1))
        if first is None:
            return None
        query = query.where(versions.c.adapter_id == first.adapter_id)
        return _one(connection, query.order_by(versions.c.number.desc()).limit(1))
    if reference.is_name:
        found = latest(connection, reference.name)
        return found if found is not None and may_see(tenant, found.owner) else None
    query = _VERSIONS.where(adapters.c.name == reference.name)
    if reference.number:
        query = query.where(versions.c.number == reference.number)
    elif reference.alias:
        is_meant = and_(aliases.c.version_id == versions.c.id, aliases.c.name == reference.alias)
        query = query.join(aliases, is_meant)
    elif reference.digest:
        begins = versions.c.digest.startswith(reference.digest, autoescape=True)
        query = query.where(begins).order_by(versions.c.number.desc())
    rows = [row for row in _all(connection, query) if may_see(tenant, row.owner)]
    if len({row.digest for row in rows}) > 1:
        numbers = ", ".join(str(row.number) for row in reversed(rows))
        raise InvalidArgumentError(
            f"{reference.digest!r} is the beginning of several versions of adapter "
            f"{reference.name!r} ({numbers}); give more digits"
        )
    return rows[0] if rows else None


def page(connection: Connection, after: str, size: int, tenant: str) -> list[Version]:
    """Returns up to `size` newest versions of the names that sort after `after`."""
    query = _LATEST.where(adapters.c.name > after).order_by(adapters.c.name).limit(size)
    found = [_all(connection, part) for part in _of_each_owner(query, tenant)]
    merged = heapq.merge(*found, key=lambda version: version.name)
    return list(itertools.islice(merged, size))


def versions_of(connection: Connection, name: str, below: int, size: int) -> list[Version]:
    """Returns up to `size` versions of a name, the newest first, of those numbered below `below`.

    0 is as if there were no bound.
    """
    query = _VERSIONS.where(adapters.c.name == name).order_by(versions.c.number.desc()).limit(size)
    return _all(connection, query.where(versions.c.number < below) if below else query)


def aliases_of(connection: Connection, names: Iterable[str]) -> Mapping[str, list[Alias]]:
    """Returns the aliases of each of these names that has some, in their order."""
    query = (
        select(adapters.c.name, aliases.c.name, versions.c.number)
        .select_from(aliases)
        .join(versions, aliases.c.version_id == versions.c.id)
        .join(adapters, aliases.c.adapter_id == adapters.c.id)
        .where(adapters.c.name.in_(list(names)))
        .order_by(aliases.c.name)
    )
    found: dict[str, list[Alias]] = {}
    for adapter, alias, number in connection.execute(query):
        found.setdefault(adapter, []).append(Alias(alias, number))
    return found


def count(connection: Connection, tenant: str) -> int:
    """Returns how many names a tenant sees."""
    query = select(func.count()).select_from(adapters)
    return sum(connection.execute(part).scalar_one() for part in _of_each_owner(query, tenant))


def neighbours(connection: Connection, name: str, size: int, tenant: str) -> list[str]:
    """Returns about `size` names that a tenant sees, from around where a name would stand."""
    values: dict[str, Any] = {"name": name, "size": size // 4}
    if sees_all(tenant):
        return [near for q in _NEIGHBOURS for near in connection.execute(q, values).scalars()]
    return [
        near
        for owner in (OPERATOR, tenant)
        for query in _OWNERS_NEIGHBOURS
        for near in connection.execute(query, values | {"owner": owner}).scalars()
    ]


def blob(connection: Connection, version: Version) -> bytes:
    """Returns the file of a version.

    Raises NotFoundError if the version is gone, DataLossError if its bytes are not those that were
    put.
    """
    query = (
        select(blobs.c.bytes)
        .select_from(versions)
        .outerjoin(blobs, versions.c.sha256 == blobs.c.sha256)
        .where(versions.c.id == version.id)
    )
    row = connection.execute(query).first()
    if row is None:
        raise NotFoundError(f"adapter {version.label!r} was deleted meanwhile")
    if row.bytes is None or hashlib.sha256(row.bytes).hexdigest() != version.sha256:
        raise DataLossError(damaged(version))
    return bytes(row.bytes)


def damaged(version: Version) -> str:
    """Returns what to tell who needs a version that is damaged."""
    return (
        f"version {version.number} of adapter {version.name!r} is damaged: its bytes are no longer "
        f"those of {version.digest}; put the adapter again"
    )


def _visible(query: Select[Any], tenant: str) -> Select[Any]:
    if sees_all(tenant):
        return query
    return query.where(or_(tenants.c.name == OPERATOR, tenants.c.name == tenant))


def _of_each_owner(query: Select[Any], tenant: str) -> list[Select[Any]]:
    """Returns queries that together are this one of the names that a tenant sees.

    One of each owner goes along an index in the order of names.
    """
    if sees_all(tenant):
        return [query]
    return [query.where(_OF_OWNER).params(owner=owner) for owner in (OPERATOR, tenant)]


def _all(connection: Connection, query: Select[Any]) -> list[Version]:
    return [Version(*row) for row in connection.execute(query)]


def _one(connection: Connection, query: Select[Any], **values: Any) -> Version | None:
    row = connection.execute(query, values).first()
    return None if row is None else Version(*row)
