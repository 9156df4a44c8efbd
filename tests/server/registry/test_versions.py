"""Versions and aliases of names: what they mean, and when they go."""

import asyncio
import contextlib
import re

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import select

from redmux.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
)
from redmux_server.registry.schema import audit, blobs, versions

A, B = "key-a", "key-b"
OWNER = "whose it is"


async def put_all(registry, name, files, tenant=""):
    for data in files:
        await registry.put(name, data, "", True, tenant)


async def test_every_put_of_other_content_makes_the_next_version(open_kept, adapters, files):
    await put_all(open_kept(), "x", [*files[:2], files[1], files[0]])
    registry = open_kept()
    found = [await registry.resolve(f"x@{number}") for number in (1, 2, 3)]
    assert [p.read() for p in found] == [adapters[0], adapters[1], adapters[0]]
    assert [p.reference for p in found] == ["x@1", "x@2", "x@3"]
    for text in ("x", "x@latest", "x@3"):
        assert (await registry.resolve(text)).number == 3
    assert [p.number for p in await registry.versions("x", 0, 2)] == [3, 2]
    assert [p.number for p in await registry.versions("x", 2, 9)] == [1]
    assert len(registry) == 1


async def test_a_version_is_meant_by_the_beginning_of_its_digest(open_kept, adapters, files):
    registry = open_kept()
    await put_all(registry, "x", [files[0], files[1], files[0]])
    for digits in (8, 20, 64):
        text = f"x@{adapters[1].digest[: 7 + digits]}"
        assert (await registry.resolve(text)).number == 2
    assert (await registry.resolve(f"x@{adapters[0].digest}")).number == 3  # the newest of them
    for text in (f"x@{adapters[1].digest[:14]}", f"x@{adapters[2].digest}", "x@sha256:________"):
        with pytest.raises(NotFoundError):
            await registry.resolve(text)


async def test_a_beginning_of_two_digests_says_which_versions_they_are(
    open_registry, files, adapters
):
    registry = open_registry()
    await put_all(registry, "x", files[:2])
    alike = adapters[0].digest[:20]

    def damage(connection):
        this = versions.c.digest == adapters[1].digest
        connection.execute(versions.update().where(this).values(digest=alike + "0" * 51))

    registry._database.write_now(damage)
    with pytest.raises(InvalidArgumentError, match=r"several versions of adapter 'x' \(1, 2\)"):
        await registry.resolve(f"x@{alike}")


@pytest.mark.parametrize("text", ["x@4", "x@0", "x@prod", "x@sha256:00000000", "x@@", "x@ 1"])
async def test_a_version_that_is_not_there_is_not_found(text, open_kept, files):
    registry = open_kept()
    await put_all(registry, "x", files[:2])
    with pytest.raises(NotFoundError, match=r"adapter .*x"):
        await registry.resolve(text)
    with pytest.raises(NotFoundError, match="has no version '4'; its newest is 2"):
        await registry.resolve("x@4")


async def test_a_deleted_version_goes_alone_and_its_number_is_not_used_again(
    open_kept, adapters, files
):
    registry = open_kept()
    await put_all(registry, "x", files[:3])
    held = await registry.resolve("x@3")
    assert (await registry.delete("x@3")) is held
    assert held.read() == adapters[2]
    assert (await registry.resolve("x")).number == 2
    await put_all(registry, "x", files[3:4])
    assert (await registry.resolve("x")).number == 4
    with pytest.raises(NotFoundError):
        await registry.resolve("x@3")
    await registry.delete(f"x@{adapters[0].digest[:17]}")
    await registry.delete("x@2")
    assert (await registry.delete("x@4")).read() == adapters[3]
    assert not await registry.has("x")
    assert len(registry) == 0


async def test_what_was_resolved_stays_what_it_was_whatever_is_deleted(open_kept, adapters, files):
    await put_all(open_kept(), "x", files[:2])
    registry = open_kept(cache_bytes=0)
    held = [await registry.resolve(text) for text in ("x@1", "x@2")]
    await registry.delete("x")
    assert [await registry.fetch(p) for p in held] == adapters[:2]


async def test_an_alias_is_a_version_until_it_is_moved(open_kept, files):
    registry = open_kept()
    await put_all(registry, "x", files[:3])
    assert (await registry.set_alias("x", "prod", "2")).number == 2
    assert (await registry.set_alias("x", "next", "latest")).number == 3
    held = await registry.resolve("x@prod")
    assert (await registry.set_alias("x", "prod", "next")).number == 3
    registry = open_kept()
    assert (held.number, (await registry.resolve("x@prod")).number) == (2, 3)
    aliases = await registry.aliases(["x", "y"])
    assert {a.name: a.number for a in aliases["x"]} == {"next": 3, "prod": 3}
    await registry.delete_alias("x", "next")
    with pytest.raises(NotFoundError, match="has no version 'next'"):
        await registry.resolve("x@next")
    with pytest.raises(NotFoundError, match="has no alias 'next'"):
        await registry.delete_alias("x", "next")
    with pytest.raises(NotFoundError, match="has no version '9'"):
        await registry.set_alias("x", "prod", "9")


async def test_nothing_is_deleted_while_an_alias_points_there(open_kept, files):
    registry = open_kept()
    await put_all(registry, "x", files[:2])
    await registry.set_alias("x", "prod", "1")
    for text in ("x", "x@1", "x@prod"):
        with pytest.raises(FailedPreconditionError, match="'prod' of adapter 'x' points at ver"):
            await registry.delete(text)
    await registry.delete("x@2")
    await registry.delete_alias("x", "prod")
    await registry.delete("x")


@pytest.mark.parametrize(
    "alias", ["latest", "3", "", "A", "a b", "a/b", "a@b", "a" * 65, "sha256:a"]
)
async def test_what_is_no_alias_is_refused(alias, open_registry, files):
    registry = open_registry()
    await put_all(registry, "x", files[:1])
    with pytest.raises(InvalidArgumentError, match=re.escape(repr(alias[:80]))):
        await registry.set_alias("x", alias, "1")


async def test_aliases_are_their_owners_to_move(open_kept, files):
    registry = open_kept()
    await put_all(registry, "a", files[:1], A)
    await put_all(registry, "ours", files[:1])
    await registry.set_alias("a", "prod", "1", A)
    for change in (registry.set_alias("a", "prod", "1", B), registry.delete_alias("a", "prod", B)):
        with pytest.raises(NotFoundError):
            await change
    with pytest.raises(NotFoundError):
        await registry.resolve("a@prod", B)
    with pytest.raises(PermissionDeniedError):
        await registry.set_alias("ours", "prod", "1", B)
    with pytest.raises(NotFoundError):
        await registry.versions("a", 0, 9, B)


async def test_servers_of_one_database_see_each_others_changes(
    postgresql, open_registry, adapters, files
):
    place = postgresql.new_database()
    one, two = open_registry(place), open_registry(place, cache_bytes=0)
    await asyncio.gather(*(r.put(f"x{n}", files[n], "", False) for n in (0, 1) for r in (one, two)))
    await put_all(one, "x", files[:2])
    held = await two.resolve("x@1")
    await one.set_alias("x", "prod", "2")
    assert (await two.resolve("x@prod")).number == 2
    await one.delete("x@1")
    with pytest.raises(NotFoundError, match="'x@1' was deleted meanwhile"):
        await two.fetch(held)
    await put_all(two, "x", files[2:3])
    assert (await one.resolve("x")).read() == adapters[2]
    assert [await r.count() for r in (one, two)] == [3, 3]
    assert len(two) == 3
    await two.delete("x0")
    await two.delete("x1")
    assert len(two) == 1
    for registry in (one, two):
        await registry.close()


async def test_of_puts_beside_each_other_every_one_gets_its_own_number(open_kept, files):
    one, two = open_kept(), open_kept()
    await asyncio.gather(*(
        registry.put("x", files[n % 4], "", True) for n in range(12) for registry in (one, two)
    ))  # fmt: skip
    found = [p.number for p in await one.versions("x", 0, 99)]
    assert found == list(range(len(found), 0, -1))


async def test_the_audit_has_every_change_and_nothing_else(open_kept, adapters, files):
    registry = open_kept()
    await put_all(registry, "x", [files[0], files[0], files[1]], A)
    await registry.set_alias("x", "prod", "1", A)
    await registry.delete_alias("x", "prod", "admin")
    await registry.delete("x@1", A)
    with pytest.raises(AlreadyExistsError):
        await registry.put("x", files[2], "", False, A)
    columns = audit.c.who, audit.c.action, audit.c.adapter, audit.c.version, audit.c.alias
    query = select(*columns).order_by(audit.c.id)
    rows = open_kept()._database.read_now(lambda c: c.execute(query).all())
    assert [tuple(row) for row in rows] == [
        (A, "put", "x", 1, None), (A, "put", "x", 2, None), (A, "set_alias", "x", 1, "prod"),
        ("admin", "delete_alias", "x", None, "prod"), (A, "delete", "x", 1, None),
    ]  # fmt: skip


NAMES = st.sampled_from(["a", "team/a"])
TENANTS = st.sampled_from([OWNER, OWNER, OWNER, "", A, B])
ALIASES = st.sampled_from(["prod", "next"])
NUMBERS = st.integers(0, 5)  # an index into the versions that there are, 0 for none of them


class Model(RuleBasedStateMachine):
    """The registry beside plain dictionaries, through restarts."""

    def __init__(self, open_kept, adapters, files):
        super().__init__()
        self.open, self.adapters, self.files = open_kept, adapters, files
        self.registry = open_kept()
        self.names = {}  # name -> (owner, last number, {number: index}, {alias: number})

    @initialize()
    def empty(self):
        for name in ("a", "team/a"):
            for alias in ("prod", "next"):
                self.run(self.quiet(self.registry.delete_alias(name, alias)))
            self.run(self.quiet(self.registry.delete(name)))

    async def quiet(self, call):
        with contextlib.suppress(NotFoundError):
            await call

    def run(self, call, error=None):
        if error is None:
            return asyncio.run(call)
        with pytest.raises(error):
            asyncio.run(call)
        return None

    def played(self, name, tenant, pick=0):
        """Returns the tenant that is meant, and the number of a version."""
        owner, _, numbers, _ = self.names.get(name, (A, 0, {}, {}))
        known = sorted(numbers)
        number = known[-(pick % len(known)) or -1] if pick and known else 99
        return (owner if tenant == OWNER else tenant), number

    def changing(self, name, tenant):
        """Returns what a change of a name by a tenant meets: an error, or None."""
        owner = self.names[name][0] if name in self.names else None
        if owner is None or (owner == B and tenant == A) or (owner == A and tenant == B):
            return NotFoundError
        return PermissionDeniedError if owner == "" and tenant != "" else None

    @rule(name=NAMES, index=st.integers(0, 2), replace=st.booleans(), tenant=TENANTS)
    def put(self, name, index, replace, tenant):
        tenant, _ = self.played(name, tenant)
        call = self.registry.put(name, self.files[index], "", replace, tenant)
        error = self.changing(name, tenant) if name in self.names else None
        if error is not None:
            self.run(call, AlreadyExistsError if error is NotFoundError and not replace else error)
            return
        owner, last, numbers, aliases = self.names.get(name, (tenant, 0, {}, {}))
        newest = numbers[max(numbers)] if numbers else None
        if newest not in (None, index) and not replace:
            self.run(call, AlreadyExistsError)
            return
        published, is_new = self.run(call)
        assert is_new == (newest != index)
        if is_new:
            numbers[last + 1] = index
            self.names[name] = owner, last + 1, numbers, aliases
        assert published.number == max(numbers)

    @rule(name=NAMES, tenant=TENANTS)
    def delete_name(self, name, tenant):
        tenant, _ = self.played(name, tenant)
        error = self.changing(name, tenant)
        if error is None and self.names[name][3]:
            error = FailedPreconditionError
        self.run(self.registry.delete(name, tenant), error)
        if error is None:
            del self.names[name]

    @rule(name=NAMES, pick=NUMBERS, tenant=TENANTS)
    def delete_version(self, name, pick, tenant):
        tenant, number = self.played(name, tenant, pick)
        error = self.changing(name, tenant)
        if name in self.names and number not in self.names[name][2]:
            error = NotFoundError
        if error is None and number in self.names[name][3].values():
            error = FailedPreconditionError
        gone = self.run(self.registry.delete(f"{name}@{number}", tenant), error)
        if error is None:
            assert gone.read() == self.adapters[self.names[name][2].pop(number)]
            if not self.names[name][2]:
                del self.names[name]

    @rule(name=NAMES, alias=ALIASES, pick=NUMBERS, tenant=TENANTS)
    def set_alias(self, name, alias, pick, tenant):
        tenant, number = self.played(name, tenant, pick)
        error = self.changing(name, tenant)
        if name in self.names and number not in self.names[name][2]:
            error = NotFoundError
        self.run(self.registry.set_alias(name, alias, str(number), tenant), error)
        if error is None:
            self.names[name][3][alias] = number

    @rule(name=NAMES, alias=ALIASES, tenant=TENANTS)
    def delete_alias(self, name, alias, tenant):
        tenant, _ = self.played(name, tenant)
        error = self.changing(name, tenant)
        if error is None and alias not in self.names[name][3]:
            error = NotFoundError
        self.run(self.registry.delete_alias(name, alias, tenant), error)
        if error is None:
            del self.names[name][3][alias]

    @precondition(lambda self: self.names)
    @rule()
    def restart(self):
        self.registry = self.open()

    @invariant()
    def everything_is_as_it_should_be(self):
        self.run(self.check())

    async def check(self):
        for tenant in (A, B, ""):
            seen = [
                n for n in sorted(self.names) if tenant == "" or self.names[n][0] in ("", tenant)
            ]
            assert [p.name for p in await self.registry.page("", 9, tenant)] == seen
            assert await self.registry.count(tenant) == len(seen)
        assert len(self.registry) == len(self.names)
        aliases = await self.registry.aliases(self.names)
        for name, (_, _, numbers, known) in self.names.items():
            assert [p.number for p in await self.registry.versions(name, 0, 99)] == sorted(
                numbers, reverse=True
            )
            for number, index in numbers.items():
                got = await self.registry.fetch(await self.registry.resolve(f"{name}@{number}"))
                assert got == self.adapters[index]
            assert {a.name: a.number for a in aliases.get(name, ())} == known
            for alias, number in known.items():
                assert (await self.registry.resolve(f"{name}@{alias}")).number == number
        kept = {index for entry in self.names.values() for index in entry[2].values()}
        query = select(blobs.c.sha256)
        assert len(self.registry._database.read_now(lambda c: c.execute(query).all())) == len(kept)


def test_it_behaves_like_dictionaries_that_survive_restarts(open_kept, adapters, files):
    run_state_machine_as_test(
        lambda: Model(open_kept, adapters, files),
        settings=settings(max_examples=10, stateful_step_count=30, deadline=None),
    )
