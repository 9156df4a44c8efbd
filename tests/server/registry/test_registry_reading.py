"""Vectors that are read when they are needed: always the version that was resolved."""

import asyncio
import gc

import pytest

from redmux_server.registry import changes
from redmux_server.registry.given import read_given
from redmux_server.registry.published import Published


def count_reads(monkeypatch):
    """Notes the name of every version that is read."""
    names, read = [], Published.read

    def noting(version):
        names.append(version.name)
        return read(version)

    monkeypatch.setattr(Published, "read", noting)
    return names


async def fill(open_registry, folder, files, names="abcd"):
    """A registry that starts over a folder with one of `files` under each name."""
    registry = open_registry(folder)
    for name, data in zip(names, files, strict=False):
        await registry.put(name, data, "", replace=False)
    return open_registry(folder)


async def test_a_registered_adapter_that_nobody_uses_takes_no_memory(
    tmp_path, open_registry, files
):
    registry = open_registry(tmp_path)
    new = registry._kept.checked(files[0], "")[1]

    def put_all(connection):
        for number in range(1100):
            changes.put(connection, f"n{number:04d}", new, False, "")

    registry._database.write_now(put_all)
    registry = open_registry(tmp_path)
    assert (len(registry), len(held_by(registry))) == (1100, 0)
    for number in range(1100):
        await registry.resolve(f"n{number:04d}")
    assert len(held_by(registry)) == 1024


def held_by(registry):
    gc.collect()
    rules = registry.rules
    return [p for p in gc.get_objects() if type(p) is Published and p._rules is rules]


async def test_what_was_fetched_is_fetched_again_without_reading(
    tmp_path, open_registry, adapters, files, monkeypatch
):
    registry = await fill(open_registry, tmp_path, files)
    names = count_reads(monkeypatch)
    first = await registry.fetch(await registry.resolve("a"))
    assert first == adapters[0]
    assert await registry.fetch(await registry.resolve("a")) is first
    assert names == ["a"]


async def test_a_put_adapter_is_ready_at_once(
    tmp_path, open_registry, adapters, files, monkeypatch
):
    registry = open_registry(tmp_path)
    await registry.put("a", files[0], "", replace=False)
    names = count_reads(monkeypatch)
    assert await registry.fetch(await registry.resolve("a")) == adapters[0]
    assert names == []


async def test_many_who_wait_for_one_file_read_it_once(tmp_path, open_registry, files, monkeypatch):
    registry = await fill(open_registry, tmp_path, files)
    names = count_reads(monkeypatch)
    held = await registry.resolve("a")
    got = await asyncio.gather(*(registry.fetch(held) for _ in range(9)))
    assert names == ["a"]
    assert all(adapter is got[0] for adapter in got)


async def test_one_who_stops_waiting_takes_nothing_from_the_others(
    tmp_path, open_registry, adapters, files
):
    registry = await fill(open_registry, tmp_path, files)
    waiting = [asyncio.create_task(registry.fetch(await registry.resolve("a"))) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    got = await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(got[0], asyncio.CancelledError)
    assert got[1:] == [adapters[0]] * 2


async def test_the_cache_keeps_the_adapters_used_last_within_its_bytes(
    tmp_path, open_registry, files, monkeypatch
):
    registry = await fill(open_registry, tmp_path, files)
    await registry.fetch(await registry.resolve("a"))
    registry = open_registry(tmp_path, cache_bytes=2 * registry._cache.nbytes)
    names = count_reads(monkeypatch)
    for name in "abacab":
        await registry.fetch(await registry.resolve(name))
    assert names == ["a", "b", "c", "b"]
    assert len(registry._cache) == 2
    assert registry._cache.nbytes <= registry._cache._max_bytes


async def test_without_a_cache_everything_is_read_each_time(
    tmp_path, open_registry, adapters, files, monkeypatch
):
    await fill(open_registry, tmp_path, files)
    registry = open_registry(tmp_path, cache_bytes=0)
    names = count_reads(monkeypatch)
    for _ in range(3):
        assert await registry.fetch(await registry.resolve("a")) == adapters[0]
    assert names == ["a"] * 3
    assert registry._cache.nbytes == 0


@pytest.mark.parametrize("change", ["replace", "delete", "replace twice"])
async def test_a_version_is_read_after_its_file_has_gone(
    change, tmp_path, open_registry, adapters, files
):
    registry = await fill(open_registry, tmp_path, files)
    held = await registry.resolve("a")
    if change == "delete":
        await registry.delete("a")
    for data in {"replace": files[1:2], "replace twice": files[1:3]}.get(change, []):
        await registry.put("a", data, "", replace=True)
    assert await registry.fetch(held) == adapters[0]


async def test_a_replaced_version_goes_with_the_last_who_holds_it(tmp_path, open_registry, files):
    registry = await fill(open_registry, tmp_path, files, ["brief"])
    await registry.fetch(await registry.resolve("brief"))
    for data in (files[1], files[2]):
        await registry.put("brief", data, "", replace=True)
    await registry.delete("brief")
    await asyncio.sleep(0)  # the event loop lets go of the delete's own result
    gc.collect()
    versions = [thing for thing in gc.get_objects() if type(thing) is Published]
    assert not any(version.name == "brief" for version in versions)


async def test_an_adapter_from_elsewhere_does_not_follow_its_file(
    tmp_path, open_registry, adapters, files
):
    path = tmp_path / "x.safetensors"
    path.write_bytes(files[0])
    registry = open_registry()
    registry.load(*read_given([f"x={path}"]))
    path.write_bytes(files[1])
    assert (await registry.resolve("x")).read() == adapters[0]
