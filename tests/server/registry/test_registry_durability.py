"""What was acknowledged is on disk, whole, whatever happens next."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from redmux.errors import ResourceExhaustedError
from redmux_adapters import read_adapter, to_bytes
from redmux_server.registry import disk
from redmux_server.registry.given import read_given


def visible(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


async def test_an_acknowledged_put_is_a_whole_file_of_its_own(
    tmp_path, open_registry, adapters, files
):
    registry = open_registry(tmp_path)
    await registry.put("team/x", files[0], "", replace=False)
    assert visible(tmp_path) == ["team/x.safetensors"]
    assert read_adapter(tmp_path / "team/x.safetensors") == adapters[0]
    assert open_registry(tmp_path).resolve("team/x").read() == adapters[0]


async def test_a_deleted_adapter_does_not_come_back(tmp_path, open_registry, files):
    registry = open_registry(tmp_path)
    await registry.put("x", files[0], "", replace=False)
    await registry.delete("x")
    assert visible(tmp_path) == []
    assert len(open_registry(tmp_path)) == 0


async def test_the_file_is_synced_before_it_appears_and_its_folder_after(
    tmp_path, open_registry, files, monkeypatch
):
    calls = []
    final = tmp_path / "x.safetensors"
    fsync = os.fsync

    def spy(descriptor):
        is_folder = Path(f"/proc/self/fd/{descriptor}").resolve().is_dir()
        calls.append(("folder" if is_folder else "file", final.exists()))
        fsync(descriptor)

    registry = open_registry(tmp_path)
    monkeypatch.setattr(os, "fsync", spy)
    await registry.put("x", files[0], "", replace=False)
    assert calls == [("file", False), ("folder", True)]


async def test_a_failed_write_publishes_nothing_and_leaves_the_old_content(
    tmp_path, open_registry, adapters, files, monkeypatch
):
    registry = open_registry(tmp_path)
    await registry.put("x", files[0], "", replace=False)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceExhaustedError, match="No space"):
        await registry.put("x", files[1], "", replace=True)
    with pytest.raises(ResourceExhaustedError, match="No space"):
        await registry.put("y", files[1], "", replace=False)
    monkeypatch.undo()
    assert [p.name for p in registry.page("", 9)] == ["x"]
    assert registry.resolve("x").read() == adapters[0]
    assert visible(tmp_path) == ["x.safetensors"]
    assert open_registry(tmp_path).resolve("x").read() == adapters[0]
    await registry.put("y", files[1], "", replace=False)  # the next one is not blocked


async def test_leftovers_of_a_killed_write_are_swept(tmp_path, open_registry, files):
    (tmp_path / "team").mkdir()
    (tmp_path / ".abc.tmp").write_bytes(files[0][:40])
    (tmp_path / "team" / ".def.tmp").write_bytes(b"")
    registry = open_registry(tmp_path)
    assert len(registry) == 0
    assert visible(tmp_path) == []


async def test_files_that_cannot_be_used_are_reported_and_stop_nothing(
    tmp_path, open_registry, make_adapter, adapters, files, caplog
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
    deep = tmp_path / "a" / "b" / "c.safetensors"
    deep.parent.mkdir(parents=True)
    deep.write_bytes(files[0])

    registry = open_registry(tmp_path)
    assert [p.name for p in registry.page("", 9)] == ["good"]
    assert {p.name for p in registry.unusable} == {
        *bad, "folder.safetensors", "link.safetensors", "pipe.safetensors", "c.safetensors"
    }  # fmt: skip
    for path in registry.unusable:
        assert str(path) in caplog.text
        assert path.exists()  # kept for a person to look at


async def test_a_put_repairs_a_file_that_cannot_be_used(tmp_path, open_registry, adapters, files):
    (tmp_path / "x.safetensors").write_bytes(files[0][:-1])
    registry = open_registry(tmp_path)
    await registry.put("x", files[1], "", replace=False)
    assert open_registry(tmp_path).resolve("x").read() == adapters[1]


async def test_putting_what_was_loaded_from_elsewhere_keeps_it(
    tmp_path, open_registry, adapters, files
):
    elsewhere = tmp_path / "elsewhere.safetensors"
    elsewhere.write_bytes(files[0])
    folder = tmp_path / "kept"
    registry = open_registry(folder)
    registry.load(*read_given([f"x={elsewhere}"]))
    await registry.put("x", files[0], "", replace=False)
    assert open_registry(folder).resolve("x").read() == adapters[0]


async def test_a_kept_adapter_wins_over_one_loaded_before(tmp_path, open_registry, adapters, files):
    elsewhere = tmp_path / "elsewhere.safetensors"
    elsewhere.write_bytes(files[0])
    folder = tmp_path / "kept"
    await open_registry(folder).put("x", files[1], "", replace=False)
    registry = open_registry(folder)
    registry.load(*read_given([f"x={elsewhere}"]))
    registry.load_folder()
    assert registry.resolve("x").read() == adapters[1]


async def test_an_adapter_loaded_from_elsewhere_can_be_deleted(tmp_path, open_registry, files):
    elsewhere = tmp_path / "elsewhere.safetensors"
    elsewhere.write_bytes(files[0])
    registry = open_registry(tmp_path / "kept")
    registry.load(*read_given([f"team/x={elsewhere}"]))
    await registry.delete("team/x")
    assert elsewhere.exists()
    assert len(registry) == 0


async def test_a_replacement_never_shows_half_of_itself(tmp_path, open_registry, files):
    """It is another file that takes the name: whoever reads the old one reads it whole."""
    registry = open_registry(tmp_path)
    await registry.put("x", files[0], "", replace=False)
    before = (tmp_path / "x.safetensors").read_bytes()
    with (tmp_path / "x.safetensors").open("rb", buffering=0) as old:
        await registry.put("x", files[1], "", replace=True)
        assert old.read() == before
    assert (tmp_path / "x.safetensors").read_bytes() != before


class Gate:
    """Stops the first call of a function on its thread until it may go on."""

    def __init__(self, function):
        self.function, self.entered, self.go = function, threading.Event(), threading.Event()

    def __call__(self, *args):
        if not self.entered.is_set():
            self.entered.set()
            assert self.go.wait(10)
        self.function(*args)


async def abandon(gate, call):
    """Starts a call and gives it up while its file is being changed."""
    task = asyncio.create_task(call)
    await asyncio.to_thread(gate.entered.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def overtake(gate, call):
    """Runs a call beside the abandoned one, as far ahead of it as it can get."""
    task = asyncio.create_task(call)
    for _ in range(50):
        await asyncio.to_thread(int)
    gate.go.set()
    await task
    for _ in range(50):
        await asyncio.to_thread(int)


async def test_a_caller_who_goes_away_from_a_put_cannot_undo_a_later_put(
    tmp_path, open_registry, adapters, files, monkeypatch
):
    registry = open_registry(tmp_path)
    gate = Gate(disk.write)
    monkeypatch.setattr(disk, "write", gate)
    await abandon(gate, registry.put("x", files[0], "", replace=True))
    await overtake(gate, registry.put("x", files[1], "", replace=True))
    assert registry.resolve("x").read() == adapters[1]
    assert open_registry(tmp_path).resolve("x").read() == adapters[1]


async def test_a_caller_who_goes_away_from_a_delete_cannot_undo_a_later_put(
    tmp_path, open_registry, adapters, files, monkeypatch
):
    registry = open_registry(tmp_path)
    await registry.put("x", files[0], "", replace=True)
    gate = Gate(disk.remove)
    monkeypatch.setattr(disk, "remove", gate)
    await abandon(gate, registry.delete("x"))
    await overtake(gate, registry.put("x", files[1], "", replace=True))
    assert registry.resolve("x").read() == adapters[1]
    assert open_registry(tmp_path).resolve("x").read() == adapters[1]


async def test_a_folder_is_given_up_once_a_change_is_written_that_nobody_waits_for(
    tmp_path, open_registry, adapters, files, monkeypatch
):
    registry = open_registry(tmp_path)
    gate = Gate(disk.write)
    monkeypatch.setattr(disk, "write", gate)
    await abandon(gate, registry.put("x", files[0], "", replace=True))
    closing = asyncio.create_task(registry.close())
    for _ in range(50):
        await asyncio.to_thread(int)
    assert not closing.done()
    gate.go.set()
    await closing
    assert open_registry(tmp_path).resolve("x").read() == adapters[0]


_WRITER = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from conftest import FINGERPRINT, SITES, small_adapter
from redmux_adapters import to_bytes
from redmux_server.registry.registry import AdapterRegistry

async def main():
    registry = AdapterRegistry(FINGERPRINT, SITES, Path(sys.argv[2]))
    assert registry.load_folder() == []
    files = [to_bytes(small_adapter(seed)) for seed in range(4)]
    for n in range(1_000_000):
        name, index = f"t{n % 3}/a{n % 7}", n * 5 % 4
        print("begin", name, index, flush=True)
        await registry.put(name, files[index], "", True)
        print("done", name, index, flush=True)

asyncio.run(main())
"""


def write_until_killed(folder, num_done):
    """Runs a writer, kills it after so many acknowledgements; returns (acknowledged, begun)."""
    command = [sys.executable, "-c", _WRITER, str(Path(__file__).parents[1]), str(folder)]
    kept, begun, count = {}, None, 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            word, name, index = line.split()
            if word == "begin":
                begun = (name, int(index))
            else:
                kept[name], begun = int(index), None
                count += 1
            if count == num_done:  # what it prints after this is read, too
                process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    return kept, begun


def test_every_acknowledged_put_is_whole_after_kill_9(tmp_path, open_registry, adapters):
    expected = {}
    for num_done in (5, 23, 40):
        kept, begun = write_until_killed(tmp_path, num_done)
        assert len(kept) >= 5
        expected |= kept
        registry = open_registry(tmp_path)
        assert registry.unusable == []
        found = {p.name: [a.digest for a in adapters].index(p.digest)
                 for p in registry.page("", 99)}  # fmt: skip
        if begun is not None:  # this one may be there or not, but not broken
            name, index = begun
            if found.get(name) == index:
                expected[name] = index
        assert found == expected
