"""Owners of names: what is not a tenant's is to it as if it were not there."""

import pytest

from redmux.errors import AlreadyExistsError, NotFoundError, PermissionDeniedError
from redmux_server.registry.given import read_given
from redmux_server.registry.tenants import ADMIN

A, B = "key-a", "key-b"


@pytest.fixture(params=["in memory", "after a restart"])
async def registry(request, tmp_path, open_registry, files):
    """Names of two tenants, the operator's put by the admin key and without one, and a given one.

    `both` has the content of `b/own`.
    """
    folder = None if request.param == "in memory" else tmp_path / "kept"
    registry = open_registry(folder)
    for name, file, tenant in [
        ("a/own", files[0], A), ("a/other", files[1], A), ("b/own", files[2], B),
        ("admin", files[3], ADMIN), ("old", files[3], ""), ("a/same", files[2], A),
    ]:  # fmt: skip
        await registry.put(name, file, "", False, tenant)
    if folder is not None:
        registry = open_registry(folder)
    (tmp_path / "given.safetensors").write_bytes(files[0])
    registry.load(*read_given([str(tmp_path / "given.safetensors")]))
    return registry


OPERATORS = ["admin", "given", "old"]
SEEN = {
    A: ["a/other", "a/own", "a/same", *OPERATORS], B: [*OPERATORS, "b/own"], "key-c": OPERATORS,
    ADMIN: ["a/other", "a/own", "a/same", "b/own", *OPERATORS],
    "": ["a/other", "a/own", "a/same", "b/own", *OPERATORS],
}  # fmt: skip


@pytest.mark.parametrize("tenant", SEEN)
async def test_a_tenant_lists_and_finds_its_own_and_the_operators(tenant, registry):
    expected = sorted(SEEN[tenant])
    assert [p.name for p in await registry.page("", 99, tenant)] == expected
    for name in SEEN[ADMIN]:
        if name in expected:
            assert (await registry.resolve(name, tenant)).name == name
        else:
            with pytest.raises(NotFoundError, match=f"no adapter '{name}'"):
                await registry.resolve(name, tenant)


@pytest.mark.parametrize("tenant", SEEN)
async def test_pages_of_what_a_tenant_sees_add_up(tenant, registry):
    for size in (1, 2, 3):
        names, after = [], ""
        while page := await registry.page(after, size, tenant):
            assert len(page) <= size
            names += [published.name for published in page]
            after = names[-1]
        assert names == sorted(SEEN[tenant])


async def test_a_digest_stands_for_a_name_that_the_tenant_sees(registry, adapters):
    shared, alone = adapters[2].digest, adapters[1].digest
    assert (await registry.resolve(shared, A)).name == "a/same"
    assert (await registry.resolve(shared, B)).name == "b/own"
    assert (await registry.resolve(adapters[0].digest, B)).name == "given"
    with pytest.raises(NotFoundError):
        await registry.resolve(shared, "key-c")
    with pytest.raises(NotFoundError):
        await registry.resolve(alone, B)
    assert (await registry.resolve(alone, ADMIN)).name == "a/other"


async def test_nothing_is_suggested_or_counted_that_the_tenant_does_not_see(registry):
    with pytest.raises(NotFoundError, match="did you mean 'a/other'"):
        await registry.resolve("a/othe", A)
    with pytest.raises(NotFoundError) as caught:
        await registry.resolve("a/othe", B)
    assert str(caught.value) == "no adapter 'a/othe'; see ListAdapters"
    with pytest.raises(NotFoundError, match="did you mean 'given'"):
        await registry.resolve("givem", B)


async def test_what_is_another_tenants_cannot_be_changed(registry, adapters, files):
    for file in (files[0], files[3]):  # that content, or another
        with pytest.raises(NotFoundError, match="no adapter 'a/own' to replace"):
            await registry.put("a/own", file, "", True, B)
        with pytest.raises(AlreadyExistsError) as caught:
            await registry.put("a/own", file, "", False, B)
        assert str(caught.value) == "the name 'a/own' is taken; choose another"
    with pytest.raises(NotFoundError, match="no adapter 'a/own'"):
        await registry.delete("a/own", B)
    assert (await registry.resolve("a/own", A)).read() == adapters[0]


@pytest.mark.parametrize("name", OPERATORS)
async def test_what_is_the_operators_can_be_used_and_not_changed(name, registry, files):
    before = await registry.resolve(name, A)
    for replace in (True, False):
        with pytest.raises(PermissionDeniedError, match=f"{name!r} is the operator's"):
            await registry.put(name, files[1], "", replace, A)
    with pytest.raises(PermissionDeniedError, match=f"{name!r} is the operator's"):
        await registry.delete(name, A)
    assert await registry.resolve(name, A) is before


@pytest.mark.parametrize("tenant", [ADMIN, ""])
async def test_the_admin_changes_everything_and_names_keep_their_owner(
    tenant, registry, adapters, files
):
    await registry.put("a/own", files[3], "", True, tenant)
    assert (await registry.resolve("a/own", A)).read() == adapters[3]
    with pytest.raises(NotFoundError):
        await registry.resolve("a/own", B)
    await registry.put("admin", files[1], "", True, tenant)
    assert (await registry.resolve("admin", B)).read() == adapters[1]
    for name in ("b/own", "given"):
        await registry.delete(name, tenant)
        assert not await registry.has(name)


async def test_a_tenant_changes_its_own(registry, adapters, files):
    published, changed = await registry.put("b/own", files[0], "", True, B)
    assert (changed, published.owner) == (True, B)
    assert (await registry.resolve("b/own", B)).read() == adapters[0]
    await registry.delete("b/own", B)
    await registry.put("b/own", files[1], "", False, A)  # whoever comes first has a free name
    assert (await registry.resolve("b/own", A)).owner == A


async def test_owners_survive_a_restart(tmp_path, open_registry, files):
    await open_registry(tmp_path).put("x", files[0], "", False, A)
    registry = open_registry(tmp_path)
    assert (await registry.resolve("x", A)).owner == A
    for what in ("x", "x@1", "x@latest"):
        with pytest.raises(NotFoundError):
            await registry.resolve(what, B)
