"""Vectors that are read when they are needed: always the version that was resolved."""

import asyncio
import contextlib
import gc
import resource
import threading

import pytest

from redmux.errors import DataLossError, ResourceExhaustedError
from redmux_adapters.format.files import read_file
from redmux_server.registry import published
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


async def test_a_start_keeps_no_vectors(tmp_path, open_registry, files):
    registry = await fill(open_registry, tmp_path, files)
    assert all(registry.resolve(name)._data is None for name in "abcd")
    assert registry._cache.nbytes == 0


@contextlib.contextmanager
def no_descriptors():
    """The system opens nothing more for this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_a_file_that_cannot_be_opened_for_want_of_descriptors_is_not_lost(
    tmp_path, open_registry, adapters, files
):
    registry = await fill(open_registry, tmp_path, files)
    with no_descriptors(), pytest.raises(ResourceExhaustedError, match="Too many open") as caught:
        await registry.fetch(registry.resolve("a"))
    assert str(tmp_path) not in caught.value.message
    with no_descriptors(), pytest.raises(ResourceExhaustedError):
        await registry.put("a", files[1], "", replace=True)
    assert await registry.fetch(registry.resolve("a")) == adapters[0]


async def test_what_was_fetched_is_fetched_again_without_reading(
    tmp_path, open_registry, adapters, files, monkeypatch
):
    registry = await fill(open_registry, tmp_path, files)
    names = count_reads(monkeypatch)
    first = await registry.fetch(registry.resolve("a"))
    assert first == adapters[0]
    assert await registry.fetch(registry.resolve("a")) is first
    assert names == ["a"]


async def test_a_put_adapter_is_ready_at_once(
    tmp_path, open_registry, adapters, files, monkeypatch
):
    registry = open_registry(tmp_path)
    await registry.put("a", files[0], "", replace=False)
    names = count_reads(monkeypatch)
    assert await registry.fetch(registry.resolve("a")) == adapters[0]
    assert names == []


async def test_many_who_wait_for_one_file_read_it_once(tmp_path, open_registry, files, monkeypatch):
    registry = await fill(open_registry, tmp_path, files)
    names = count_reads(monkeypatch)
    got = await asyncio.gather(*(registry.fetch(registry.resolve("a")) for _ in range(9)))
    assert names == ["a"]
    assert all(adapter is got[0] for adapter in got)


async def test_one_who_stops_waiting_takes_nothing_from_the_others(
    tmp_path, open_registry, adapters, files
):
    registry = await fill(open_registry, tmp_path, files)
    waiting = [asyncio.create_task(registry.fetch(registry.resolve("a"))) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    got = await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(got[0], asyncio.CancelledError)
    assert got[1:] == [adapters[0]] * 2


async def test_the_cache_keeps_the_adapters_used_last_within_its_bytes(
    tmp_path, open_registry, files, monkeypatch
):
    registry = await fill(open_registry, tmp_path, files)
    await registry.fetch(registry.resolve("a"))
    registry = open_registry(tmp_path, cache_bytes=2 * registry._cache.nbytes)
    names = count_reads(monkeypatch)
    for name in "abacab":
        await registry.fetch(registry.resolve(name))
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
        assert await registry.fetch(registry.resolve("a")) == adapters[0]
    assert names == ["a"] * 3
    assert registry._cache.nbytes == 0


@pytest.mark.parametrize("change", ["replace", "delete", "replace twice"])
async def test_a_version_is_read_after_its_file_has_gone(
    change, tmp_path, open_registry, adapters, files
):
    registry = await fill(open_registry, tmp_path, files)
    held = registry.resolve("a")
    if change == "delete":
        await registry.delete("a")
    for data in {"replace": files[1:2], "replace twice": files[1:3]}.get(change, []):
        await registry.put("a", data, "", replace=True)
    assert await registry.fetch(held) == adapters[0]


async def test_a_version_is_read_though_its_file_is_replaced_under_the_reader(
    tmp_path, open_registry, adapters, files, monkeypatch
):
    """The reader has decided for the file and opens it only once another is in its place."""
    registry = await fill(open_registry, tmp_path, files)
    held = registry.resolve("a")
    begun, go = threading.Event(), threading.Event()

    def late(path, limit):
        if not begun.is_set():
            begun.set()
            assert go.wait(10)
        return read_file(path, limit)

    monkeypatch.setattr(published, "read_file", late)
    reading = asyncio.create_task(registry.fetch(held))
    await asyncio.to_thread(begun.wait, 10)
    await registry.put("a", files[1], "", replace=True)
    go.set()
    assert await reading == adapters[0]


async def test_a_replaced_version_goes_with_the_last_who_holds_it(tmp_path, open_registry, files):
    registry = await fill(open_registry, tmp_path, files, ["brief"])
    await registry.fetch(registry.resolve("brief"))
    for data in (files[1], files[2]):
        await registry.put("brief", data, "", replace=True)
    await registry.delete("brief")
    await asyncio.sleep(0)  # the event loop lets go of the delete's own result
    gc.collect()
    versions = [thing for thing in gc.get_objects() if type(thing) is Published]
    assert not any(version.name == "brief" for version in versions)


@pytest.mark.parametrize("damage", ["flipped bit", "cut", "removed", "other adapter", "folder"])
async def test_a_file_damaged_since_start_fails_its_own_requests_only(
    damage, tmp_path, open_registry, adapters, files
):
    registry = await fill(open_registry, tmp_path, [files[0], files[0], files[1]])
    path = tmp_path / "a.safetensors"
    data = bytearray(files[0])
    data[-1] ^= 1
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "removed":
        path.write_bytes({"flipped bit": data, "cut": data[:-1], "other adapter": files[2]}[damage])
    got = await asyncio.gather(
        *(registry.fetch(registry.resolve(name)) for name in "aabc"), return_exceptions=True
    )
    for error in got[:2]:
        assert isinstance(error, DataLossError)
        assert "'a'" in str(error)
        assert adapters[0].digest in str(error)
        assert str(tmp_path) not in str(error)
    assert got[2:] == [adapters[0], adapters[1]]  # "b" has the same content in a good file


async def test_putting_it_again_repairs_a_damaged_file(tmp_path, open_registry, adapters, files):
    registry = await fill(open_registry, tmp_path, files)
    (tmp_path / "a.safetensors").write_bytes(files[0][:-1])
    _, changed = await registry.put("a", files[0], "", replace=False)
    assert not changed
    assert open_registry(tmp_path).resolve("a").read() == adapters[0]
    assert registry.resolve("a").read() == adapters[0]


async def test_a_damaged_adapter_can_be_replaced_and_deleted(
    tmp_path, open_registry, adapters, files
):
    registry = await fill(open_registry, tmp_path, files)
    for name in "ab":
        (tmp_path / f"{name}.safetensors").unlink()
    held = registry.resolve("a")
    await registry.put("a", files[3], "", replace=True)
    await registry.delete("b")
    assert registry.resolve("a").read() == adapters[3]
    with pytest.raises(DataLossError):
        await registry.fetch(held)


async def test_an_adapter_from_elsewhere_does_not_follow_its_file(
    tmp_path, open_registry, adapters, files
):
    path = tmp_path / "x.safetensors"
    path.write_bytes(files[0])
    registry = open_registry()
    registry.load(*read_given([f"x={path}"]))
    path.write_bytes(files[1])
    assert registry.resolve("x").read() == adapters[0]


async def test_without_a_folder_the_bytes_are_kept_as_they_came(open_registry, adapters, files):
    registry = open_registry()
    version, _ = await registry.put("x", files[0], "", replace=False)
    assert version._data is files[0]
    assert version.read() == adapters[0]
