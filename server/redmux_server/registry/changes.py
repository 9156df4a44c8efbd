"""Changes of what the registry keeps, each within one transaction of its caller's."""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from sqlalchemy import Connection, delete, func, insert, select, update

from redmux.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    NotFoundError,
    PermissionDeniedError,
)
from redmux_server.registry import catalogue
from redmux_server.registry.catalogue import Version
from redmux_server.registry.names import Reference
from redmux_server.registry.schema import adapters, aliases, audit, blobs, tenants, versions
from redmux_server.registry.tenants import may_change, may_see, owner_of_new


class NewVersion(NamedTuple):
    """What an adapter brings to become a version."""

    digest: str
    sha256: str
    data: bytes
    base_fingerprint: str
    config: str
    num_sites: int
    num_parameters: int
    num_head_parameters: int


def check_may_put(name: str, owner: str | None, replace: bool, tenant: str) -> None:
    """Raises unless a tenant may put something under a name that this owner has, None for nobody.

    PermissionDeniedError for a name of the operator's; for another tenant's NotFoundError if it is
    to be replaced, else AlreadyExistsError: that it is taken cannot be hidden.
    """
    if owner is None or may_change(tenant, owner):
        return
    if may_see(tenant, owner):
        raise belongs_to_operator(name)
    if replace:
        raise NotFoundError(f"no adapter {name!r} to replace; choose another name")
    raise AlreadyExistsError(f"the name {name!r} is taken; choose another")


def belongs_to_operator(name: str) -> PermissionDeniedError:
    """Returns the error for who would change what is the operator's."""
    return PermissionDeniedError(
        f"adapter {name!r} is the operator's, which only the admin key may change; put yours under "
        "another name"
    )


def other_content(name: str, digest: str) -> AlreadyExistsError:
    """Returns the error for who would replace what a name holds without saying so."""
    return AlreadyExistsError(
        f"adapter {name!r} exists with other content ({digest}); pass replace to replace it"
    )


def put(
    connection: Connection, name: str, new: NewVersion, replace: bool, tenant: str
) -> tuple[Version, bool]:
    """Makes a version the newest of a name; returns it and whether it was not that already.

    Raises as `check_may_put` does, and AlreadyExistsError where the name holds other content and
    `replace` is false.
    """
    held = catalogue.latest(connection, name)
    check_may_put(name, None if held is None else held.owner, replace, tenant)
    if held is not None and held.digest != new.digest and not replace:
        raise other_content(name, held.digest)
    _keep_blob(connection, new)
    if held is not None and (held.digest, held.config) == (new.digest, new.config):
        return held, False
    adapter_id, number = _next_number(connection, name, held, tenant)
    values = new._asdict()
    del values["data"]
    connection.execute(
        insert(versions).values(
            adapter_id=adapter_id, number=number, parent="" if held is None else held.digest,
            who=tenant, created_us=now_us(), **values,
        )
    )  # fmt: skip
    note(connection, tenant, "put", name, version=number, digest=new.digest)
    version = catalogue.latest(connection, name)
    assert version is not None
    return version, True


def doomed(connection: Connection, reference: Reference, tenant: str) -> list[Version]:
    """Returns the versions that deleting a name or a version would remove.

    None where the tenant sees no such thing. Raises PermissionDeniedError for what is not its to
    change, FailedPreconditionError where an alias points there.
    """
    found = catalogue.find(connection, reference, tenant)
    if found is None:
        return []
    if not may_change(tenant, found.owner):
        raise belongs_to_operator(found.name)
    for alias in catalogue.aliases_of(connection, [found.name]).get(found.name, ()):
        if reference.is_name or alias.number == found.number:
            raise FailedPreconditionError(
                f"alias {alias.name!r} of adapter {found.name!r} points at version {alias.number}; "
                "move or delete the alias first"
            )
    if not reference.is_name:
        return [found]
    return catalogue.versions_of(connection, found.name, 0, found.number)


def remove(connection: Connection, gone: Sequence[Version], tenant: str) -> bool:
    """Removes versions of one name; returns whether nothing of it is left, and removes it then."""
    adapter_id, name = gone[0].adapter_id, gone[0].name
    for version in gone:
        connection.execute(delete(versions).where(versions.c.id == version.id))
        is_used = select(versions.c.id).where(versions.c.sha256 == version.sha256).exists()
        connection.execute(delete(blobs).where(blobs.c.sha256 == version.sha256, ~is_used))
        note(connection, tenant, "delete", name, version=version.number, digest=version.digest)
    query = select(func.max(versions.c.number)).where(versions.c.adapter_id == adapter_id)
    newest = connection.execute(query).scalar()
    this = adapters.c.id == adapter_id
    if newest is None:
        connection.execute(delete(adapters).where(this))
    else:
        connection.execute(update(adapters).where(this).values(latest=newest))
    return newest is None


def set_alias(connection: Connection, target: Version, alias: str, tenant: str) -> None:
    """Points an alias at a version, wherever it pointed before."""
    _check_is_own(target, tenant)
    of_it = aliases.c.adapter_id == target.adapter_id, aliases.c.name == alias
    connection.execute(delete(aliases).where(*of_it))
    connection.execute(
        insert(aliases).values(
            adapter_id=target.adapter_id, name=alias, version_id=target.id, created_us=now_us()
        )
    )
    note(connection, tenant, "set_alias", target.name, version=target.number, alias=alias,
         digest=target.digest)  # fmt: skip


def delete_alias(connection: Connection, target: Version, alias: str, tenant: str) -> None:
    """Removes an alias of the adapter of `target`; raises NotFoundError if there is none."""
    _check_is_own(target, tenant)
    of_it = aliases.c.adapter_id == target.adapter_id, aliases.c.name == alias
    if not connection.execute(delete(aliases).where(*of_it)).rowcount:
        raise NotFoundError(f"adapter {target.name!r} has no alias {alias!r}")
    note(connection, tenant, "delete_alias", target.name, alias=alias)


def note(connection: Connection, who: str, action: str, adapter: str, **details: Any) -> None:
    """Adds to the audit what is being changed."""
    values = {"at_us": now_us(), "who": who, "action": action, "adapter": adapter, **details}
    connection.execute(insert(audit).values(values))


def now_us() -> int:
    """Returns the time in microseconds since 1970."""
    return time.time_ns() // 1000


def _check_is_own(target: Version, tenant: str) -> None:
    if not may_change(tenant, target.owner):
        raise belongs_to_operator(target.name)


def _keep_blob(connection: Connection, new: NewVersion) -> None:
    """Sees to it that the bytes are there and are what their key says."""
    this = blobs.c.sha256 == new.sha256
    held = connection.execute(select(blobs.c.bytes).where(this)).scalar()
    if held is None:
        values = {"sha256": new.sha256, "size": len(new.data), "bytes": new.data}
        connection.execute(insert(blobs).values(values))
    elif held != new.data:
        connection.execute(update(blobs).where(this).values(bytes=new.data))


def _next_number(
    connection: Connection, name: str, held: Version | None, tenant: str
) -> tuple[int, int]:
    """Returns the adapter of a name, which is made if need be, and its next version's number."""
    if held is not None:
        this = adapters.c.id == held.adapter_id
        number = connection.execute(select(adapters.c.last).where(this)).scalar_one() + 1
        connection.execute(update(adapters).where(this).values(latest=number, last=number))
        return held.adapter_id, number
    owner_id = _id_of_tenant(connection, owner_of_new(tenant))
    values = {"tenant_id": owner_id, "name": name, "latest": 1, "last": 1}
    return _inserted_id(connection.execute(insert(adapters).values(values))), 1


def _id_of_tenant(connection: Connection, name: str) -> int:
    known = connection.execute(select(tenants.c.id).where(tenants.c.name == name)).scalar()
    if known is not None:
        return int(known)
    values = {"name": name, "created_us": now_us()}
    return _inserted_id(connection.execute(insert(tenants).values(values)))


def _inserted_id(result: Any) -> int:
    return int(result.inserted_primary_key[0])
