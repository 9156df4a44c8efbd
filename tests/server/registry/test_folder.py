"""A watched folder of adapter files: what lies there is served, and nothing half-written."""

import asyncio
import os
from contextlib import asynccontextmanager

import pytest

from redmux.errors import (
    DataLossError,
    FailedPreconditionError,
    NotFoundError,
    PermissionDeniedError,
    ResourceExhaustedError,
)
from redmux_adapters import to_bytes
from redmux_server.registry.folder import AdapterFolder

A = "key-a"


@pytest.fixture
def open_folder(tmp_path, open_registry):
    """A registry that follows the folder `tmp_path`, and the folder."""

    def open_folder(registry=None):
        registry = registry or open_registry()
        folder = AdapterFolder(tmp_path, registry.rules)
        registry.follow(folder.open_all())
        return registry, folder

    return open_folder


async def test_files_are_served_from_the_start_under_their_paths(
    tmp_path, open_folder, adapters, files
):
    (tmp_path / "team").mkdir()
    (tmp_path / "a.safetensors").write_bytes(files[0])
    (tmp_path / "team" / "b.safetensors").write_bytes(files[1])
    registry, _ = open_folder()
    assert [p.name for p in await registry.page("", 9)] == ["a", "team/b"]
    assert (len(registry), await registry.count("key-a")) == (2, 2)
    assert await registry.fetch(await registry.resolve("team/b", A)) == adapters[1]
    assert (await registry.resolve(adapters[0].digest)).name == "a"
    assert (await registry.resolve(f"a@{adapters[0].digest[:17]}")).name == "a"
    assert (await registry.resolve("a@latest")).reference == "a"


async def test_files_that_cannot_be_used_are_told_and_stop_nothing(
    tmp_path, open_folder, make_adapter, files, caplog
):
    (tmp_path / "good.safetensors").write_bytes(files[0])
    bad = {
        "cut.safetensors": files[0][:-1],
        "empty.safetensors": b"",
        "other-base.safetensors": to_bytes(make_adapter(0, "other-base")),
        "Not A Name.safetensors": files[0],
    }
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "good.safetensors")
    (tmp_path / "notes.txt").write_text("not ours")
    os.mkfifo(tmp_path / "pipe.safetensors")
    registry, _ = open_folder()
    assert [p.name for p in await registry.page("", 9)] == ["good"]
    for name in (*bad, "folder.safetensors", "link.safetensors", "pipe.safetensors"):
        assert str(tmp_path / name) in caplog.text
    for _ in range(2):
        with pytest.raises(DataLossError, match="file of adapter 'cut' in the server's folder is"):
            await registry.resolve("cut")
    with pytest.raises(FailedPreconditionError, match=r"'other-base' cannot be used: .*other-base"):
        await registry.resolve("other-base")


async def test_a_sound_file_with_modules_of_another_model_is_not_called_damaged(
    tmp_path, open_folder, make_adapter
):
    stranger = make_adapter(0, sites={"model.layers.9.mlp.down_proj": 4})
    (tmp_path / "x.safetensors").write_bytes(to_bytes(stranger))
    registry, _ = open_folder()
    with pytest.raises(FailedPreconditionError, match="modules"):
        await registry.resolve("x")


async def test_files_are_the_operators_and_not_the_servers_to_change(tmp_path, open_folder, files):
    path = tmp_path / "x.safetensors"
    path.write_bytes(files[0])
    registry, _ = open_folder()
    for error, tenant in ((PermissionDeniedError, A), (FailedPreconditionError, "")):
        with pytest.raises(error, match="'x' is"):
            await registry.put("x", files[1], "", True, tenant)
        with pytest.raises(error, match="'x' is"):
            await registry.delete("x", tenant)
    with pytest.raises(FailedPreconditionError, match="one version and no aliases"):
        await registry.set_alias("x", "prod", "latest")
    assert path.read_bytes() == files[0]


async def test_what_the_registry_keeps_wins_over_a_file_of_that_name(
    tmp_path, open_folder, open_registry, adapters, files
):
    registry = open_registry()
    await registry.put("x", files[1], "", False)
    (tmp_path / "x.safetensors").write_bytes(files[0])
    registry, _ = open_folder(registry)
    assert (await registry.resolve("x")).digest == adapters[1].digest
    assert [p.digest for p in await registry.page("", 9)] == [adapters[1].digest]


async def test_a_file_that_is_not_what_was_published_fails_its_own_requests_only(
    tmp_path, open_folder, adapters, files
):
    for name, data in {"a": files[0], "b": files[1]}.items():
        (tmp_path / f"{name}.safetensors").write_bytes(data)
    registry, _ = open_folder()
    (tmp_path / "a.safetensors").write_bytes(files[2])
    with pytest.raises(DataLossError, match="'a' is no longer what was published") as caught:
        await registry.fetch(await registry.resolve("a"))
    assert str(tmp_path) not in str(caught.value)
    assert await registry.fetch(await registry.resolve("b")) == adapters[1]


def test_a_folder_that_is_not_there_is_told(tmp_path, open_registry):
    with pytest.raises(FailedPreconditionError, match=f"there is no folder {tmp_path}/none"):
        AdapterFolder(tmp_path / "none", open_registry().rules)


def test_a_file_that_is_being_written_is_left_for_the_next_look(tmp_path, open_folder, files):
    _, folder = open_folder()
    path = tmp_path / "x.safetensors"
    path.write_bytes(files[0])
    for _ in range(3):
        changes = folder.look()
        assert (changes.found, changes.is_settled) == ([], False)
        with path.open("ab") as file:
            file.write(b"\0")


def test_a_look_reads_only_what_has_changed(tmp_path, open_folder, files, monkeypatch):
    for name in "ab":
        (tmp_path / f"{name}.safetensors").write_bytes(files[0])
    _, folder = open_folder()
    monkeypatch.setattr("redmux_server.registry.folder.read_file", None)
    assert folder.look().found == []


@asynccontextmanager
async def following(registry, folder):
    """Follows the folder; `changed` waits for what was seen next."""
    told = asyncio.Queue()

    def tell(changes):
        registry.follow(changes)
        told.put_nowait(changes)

    watching = asyncio.create_task(folder.watch(tell))
    try:
        yield lambda: asyncio.wait_for(told.get(), 30)
    finally:
        watching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await watching


async def test_a_file_that_appears_changes_and_goes_is_published_replaced_and_retired(
    tmp_path, open_folder, adapters, files
):
    registry, folder = open_folder()
    path, new = tmp_path / "team" / "x.safetensors", tmp_path / "new"
    async with following(registry, folder) as changed:
        path.parent.mkdir()
        path.write_bytes(files[0])
        await changed()
        held = await registry.resolve("team/x")
        assert await registry.fetch(held) == adapters[0]
        new.write_bytes(files[1])
        new.rename(path)
        await changed()
        assert await registry.fetch(await registry.resolve("team/x")) == adapters[1]
        path.unlink()
        assert (await changed()).gone == ["team/x"]
        with pytest.raises(NotFoundError):
            await registry.resolve("team/x")


async def test_a_file_that_is_written_bit_by_bit_is_published_once_as_a_whole(
    tmp_path, open_folder, adapters, files
):
    registry, folder = open_folder()
    async with following(registry, folder) as changed:
        with (tmp_path / "x.safetensors").open("wb", buffering=0) as file:
            for start in range(0, len(files[0]), 40):
                file.write(files[0][start : start + 40])
                await asyncio.to_thread(int)
        (found,) = (await changed()).found
    assert found.digest == adapters[0].digest


async def test_a_damaged_file_is_served_again_once_it_is_mended(
    tmp_path, open_folder, adapters, files
):
    path = tmp_path / "x.safetensors"
    path.write_bytes(files[0][:-1])
    registry, folder = open_folder()
    with pytest.raises(DataLossError):
        await registry.resolve("x")
    async with following(registry, folder) as changed:
        path.write_bytes(files[0])
        await changed()
        assert await registry.fetch(await registry.resolve("x")) == adapters[0]


async def test_a_folder_that_the_system_does_not_watch_is_looked_at(
    tmp_path, open_folder, adapters, files, monkeypatch, caplog
):
    def exhausted(*args, **options):
        raise OSError("OS file watch limit reached")

    monkeypatch.setattr("redmux_server.registry.folder.awatch", exhausted)
    registry, folder = open_folder()
    async with following(registry, folder) as changed:
        (tmp_path / "x.safetensors").write_bytes(files[0])
        (found,) = (await changed()).found
    assert found.digest == adapters[0].digest
    assert f"{tmp_path} is looked at every half a second" in caplog.text


def test_a_shortage_of_descriptors_says_nothing_of_a_file(
    tmp_path, open_folder, files, monkeypatch
):
    _, folder = open_folder()
    (tmp_path / "x.safetensors").write_bytes(files[0])
    os.utime(tmp_path / "x.safetensors", (1, 1))

    def short(path, limit):
        raise ResourceExhaustedError("too many open files")

    with monkeypatch.context() as context:
        context.setattr("redmux_server.registry.folder.read_file", short)
        context.setattr("redmux_server.registry.folder._SETTLED_S", 0.0)
        for _ in range(2):
            changes = folder.look()
            assert (changes.found, changes.is_settled) == ([], False)
    assert [item.name for item in folder.open_all().found] == ["x"]
