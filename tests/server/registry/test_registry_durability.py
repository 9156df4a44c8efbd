"""What was acknowledged is kept, whole, whatever happens next."""

import asyncio
import signal
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import delete, text, update

from redmux.errors import DataLossError, NotFoundError, ResourceExhaustedError, UnavailableError
from redmux_adapters import AdapterMetadata, to_bytes
from redmux_server.registry import changes
from redmux_server.registry.database import FILE_NAME, Database
from redmux_server.registry.given import read_given
from redmux_server.registry.schema import blobs


async def test_an_acknowledged_put_is_there_after_a_restart(open_kept, adapters, files):
    await open_kept().put("team/x", files[0], "", replace=False)
    registry = open_kept()
    assert len(registry) == 1
    assert (await registry.resolve("team/x")).read() == adapters[0]


async def test_a_deleted_adapter_does_not_come_back(open_kept, files):
    registry = open_kept()
    await registry.put("x", files[0], "", replace=False)
    await registry.delete("x")
    assert len(open_kept()) == 0


async def test_a_full_disk_publishes_nothing_and_leaves_the_old_content(
    tmp_path, open_registry, adapters, make_adapter
):
    registry = open_registry(tmp_path)
    await registry.put("x", to_bytes(adapters[0]), "", replace=False)
    large = [to_bytes(make_adapter(seed, metadata=AdapterMetadata(description=str(seed) * 4000)))
             for seed in (1, 2)]  # fmt: skip

    def bound(pages):
        return registry._database.read_now(
            lambda c: c.execute(text(f"PRAGMA max_page_count={pages}")).scalar()
        )

    assert bound(1) > 1  # as many as there are
    for name in ("x", "y"):
        with pytest.raises(ResourceExhaustedError, match="not changed: there is no room"):
            await registry.put(name, large[0], "", replace=True)
    assert [p.name for p in await registry.page("", 9)] == ["x"]
    assert (await registry.resolve("x")).read() == adapters[0]
    bound(1 << 20)
    await registry.put("y", large[1], "", replace=False)  # the next one is not blocked
    assert len(open_registry(tmp_path)) == 2


async def test_a_backup_that_is_taken_while_it_runs_has_everything(
    tmp_path, open_registry, adapters, files
):
    registry = open_registry(tmp_path / "running")
    await registry.put("x", files[0], "", replace=False)
    (tmp_path / "copy").mkdir()
    with (
        closing(sqlite3.connect(tmp_path / "running" / FILE_NAME)) as source,
        closing(sqlite3.connect(tmp_path / "copy" / FILE_NAME)) as copy,
    ):
        source.backup(copy)
    assert (await open_registry(tmp_path / "copy").resolve("x")).read() == adapters[0]


async def test_the_same_content_is_kept_once_and_goes_with_its_last_name(open_kept, files):
    registry = open_kept()

    def num_blobs():
        query = text("SELECT count(*) FROM blobs")
        return registry._database.read_now(lambda c: c.execute(query).scalar())

    for name in "ab":
        await registry.put(name, files[0], "", replace=False)
    await registry.put("a", files[1], "", replace=True)
    assert num_blobs() == 2
    await registry.delete("a")
    assert num_blobs() == 1
    await registry.delete("b")
    assert num_blobs() == 0


def test_what_a_server_is_given_gives_way_to_what_is_kept_under_its_name(
    tmp_path, open_registry, adapters, files, caplog
):
    elsewhere = tmp_path / "elsewhere.safetensors"
    elsewhere.write_bytes(files[0])
    registry = open_registry(tmp_path)
    asyncio.run(registry.put("x", files[1], "", replace=False))
    registry = open_registry(tmp_path)
    assert registry.load(*read_given([f"x={elsewhere}"])) is None
    assert "adapter x of the option adapters is not served" in caplog.text
    assert asyncio.run(registry.resolve("x")).read() == adapters[1]


async def test_what_is_kept_for_another_base_gives_way_to_what_is_given(
    tmp_path, open_registry, make_adapter, adapters, files
):
    registry = open_registry(tmp_path)
    other = type(registry)(
        "other-base", registry.rules.expected_sites, Database.in_folder(tmp_path)
    )
    await other.put("x", to_bytes(make_adapter(3, "other-base")), "", replace=False)
    elsewhere = tmp_path / "elsewhere.safetensors"
    elsewhere.write_bytes(files[0])
    registry.load(*read_given([f"x={elsewhere}"]))
    assert (await registry.resolve("x")).read() == adapters[0]
    assert [p.digest for p in await registry.page("", 9)] == [adapters[0].digest]


async def test_putting_what_was_given_keeps_it_and_replacing_it_needs_saying(
    tmp_path, open_registry, adapters, files
):
    elsewhere = tmp_path / "elsewhere.safetensors"
    elsewhere.write_bytes(files[0])
    registry = open_registry(tmp_path)
    for given in read_given([f"x={elsewhere}", f"y={elsewhere}"]):
        registry.load(given)
    _, is_new = await registry.put("x", files[0], "", replace=False)
    assert not is_new
    with pytest.raises(Exception, match="exists with other content"):
        await registry.put("y", files[1], "", replace=False)
    await registry.put("y", files[1], "", replace=True)
    assert len(registry) == 2
    registry = open_registry(tmp_path)
    assert [(await registry.resolve(name)).read() for name in "xy"] == adapters[:2]


async def test_what_was_given_can_be_deleted_and_its_file_stays(tmp_path, open_registry, files):
    elsewhere = tmp_path / "elsewhere.safetensors"
    elsewhere.write_bytes(files[0])
    registry = open_registry(tmp_path)
    registry.load(*read_given([f"team/x={elsewhere}"]))
    await registry.delete("team/x")
    assert elsewhere.exists()
    assert len(registry) == 0


class Gate:
    """Stops the first call of a function on its thread until it may go on."""

    def __init__(self, function):
        self.function, self.entered, self.go = function, threading.Event(), threading.Event()

    def __call__(self, *args, **options):
        if not self.entered.is_set():
            self.entered.set()
            assert self.go.wait(10)
        return self.function(*args, **options)


async def abandon(gate, call):
    """Starts a call and gives it up while the database is being changed."""
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


@pytest.mark.parametrize("change", ["put", "remove"])
async def test_a_caller_who_goes_away_cannot_undo_a_later_put(
    change, tmp_path, open_registry, adapters, files, monkeypatch
):
    registry = open_registry(tmp_path)
    await registry.put("x", files[2], "", replace=True)
    gate = Gate(getattr(changes, change))
    monkeypatch.setattr(changes, change, gate)
    first = (
        registry.put("x", files[0], "", replace=True) if change == "put" else registry.delete("x")
    )
    await abandon(gate, first)
    await overtake(gate, registry.put("x", files[1], "", replace=True))
    for opened in (registry, open_registry(tmp_path)):
        assert (await opened.resolve("x")).read() == adapters[1]


async def test_a_close_waits_for_a_change_that_nobody_waits_for(
    tmp_path, open_registry, adapters, files, monkeypatch
):
    registry = open_registry(tmp_path)
    gate = Gate(changes.put)
    monkeypatch.setattr(changes, "put", gate)
    await abandon(gate, registry.put("x", files[0], "", replace=True))
    closing = asyncio.create_task(registry.close())
    for _ in range(50):
        await asyncio.to_thread(int)
    assert not closing.done()
    gate.go.set()
    await closing
    assert (await open_registry(tmp_path).resolve("x")).read() == adapters[0]


async def damage(registry, digest, data=None):
    """Changes the bytes of a version behind the registry's back, or removes them."""
    version = await registry.resolve(digest)
    sha256 = version._source.args[0].sha256

    def change(connection):
        this = blobs.c.sha256 == sha256
        if data is None:
            if connection.dialect.name == "postgresql":
                connection.execute(text("ALTER TABLE versions DROP CONSTRAINT fk_versions_sha256"))
            connection.execute(delete(blobs).where(this))
        else:
            connection.execute(update(blobs).where(this).values(bytes=data))

    if data is None and not registry._database.is_shared:
        engine = registry._database._engine
        with engine.connect() as connection:
            connection.connection.driver_connection.execute("PRAGMA foreign_keys=OFF")
    registry._database.write_now(change)


DAMAGES = {
    "last bit": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "description": lambda data: data.replace(b"peft_type", b"peft_typf"),
    "cut": lambda data: data[: len(data) // 2],
    "longer": lambda data: data + b"\0",
    "empty": lambda data: b"",
    "gone": lambda data: None,
}


@pytest.mark.parametrize("kind", DAMAGES)
async def test_a_damaged_blob_is_data_loss_of_its_version_alone(
    kind, open_kept, adapters, files, caplog
):
    registry = open_kept()
    for data in files[:2]:
        await registry.put("team/x", data, "", replace=True)
    await registry.put("good", files[2], "", replace=False)
    await damage(registry, adapters[1].digest, DAMAGES[kind](files[1]))
    registry = open_kept()
    for _ in range(2):
        with pytest.raises(
            DataLossError, match="version 2 of adapter 'team/x' is damaged"
        ) as found:
            await registry.fetch(await registry.resolve("team/x"))
        assert adapters[1].digest in str(found.value)
    assert "adapter team/x@2 was damaged" in caplog.text
    assert await registry.fetch(await registry.resolve("team/x@1")) == adapters[0]
    assert await registry.fetch(await registry.resolve("good")) == adapters[2]


async def test_putting_a_damaged_adapter_again_heals_it(open_kept, adapters, files):
    registry = open_kept()
    await registry.put("x", files[0], "", replace=False)
    await damage(registry, adapters[0].digest, b"nonsense")
    _, is_new = await registry.put("x", files[0], "", replace=False)
    assert not is_new
    assert (await open_kept().resolve("x")).read() == adapters[0]


async def test_a_damaged_adapter_can_be_replaced_and_deleted(open_kept, adapters, files):
    registry = open_kept()
    await registry.put("x", files[0], "", replace=False)
    held = await registry.resolve("x")
    await damage(registry, adapters[0].digest, b"nonsense")
    await registry.put("x", files[3], "", replace=True)
    assert (await registry.resolve("x")).read() == adapters[3]
    await registry.delete("x")
    assert len(registry) == 0
    with pytest.raises((DataLossError, NotFoundError)):
        held.read()


async def test_a_database_that_goes_away_is_unavailable_and_serves_again_when_it_is_back(
    postgresql, open_registry, adapters, files
):
    registry = open_registry(postgresql.new_database())
    await registry.put("x", files[0], "", replace=False)
    postgresql.stop()
    try:
        with pytest.raises(UnavailableError, match="database does not answer"):
            await registry.resolve("x")
        with pytest.raises(UnavailableError, match="database does not answer"):
            await registry.put("x", files[1], "", replace=True)
    finally:
        postgresql.start()
    assert await registry.fetch(await registry.resolve("x")) == adapters[0]
    await registry.put("x", files[1], "", replace=True)
    await registry.close()


_WRITER = """
import asyncio, sys
from pathlib import Path
sys.path[:0] = sys.argv[1], sys.argv[1] + "/.."
from conftest import FINGERPRINT, SITES, small_adapter
from redmux_adapters import to_bytes
from redmux_server.registry.database import FILE_NAME, Database
from redmux_server.registry.registry import AdapterRegistry

async def main():
    place = sys.argv[2]
    database = Database.at(place) if ":" in place else Database.in_folder(Path(place))
    registry = AdapterRegistry(FINGERPRINT, SITES, database)
    files = [to_bytes(small_adapter(seed)) for seed in range(4)]
    for n in range(1_000_000):
        name, index = f"t{n % 3}/a{n % 7}", n * 5 % 4
        print("begin", name, index, flush=True)
        await registry.put(name, files[index], "", True)
        print("done", name, index, flush=True)

asyncio.run(main())
"""


def write_until_killed(place, num_done):
    """Runs a writer, kills it after so many acknowledgements; returns (acknowledged, begun)."""
    tests = Path(__file__).parents[1]
    command = [sys.executable, "-c", _WRITER, str(tests), place]
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


def check_kills(open_kept, adapters, kills):
    """Every acknowledged put of each run is there and whole; the one under way may be."""
    expected, digests = {}, [adapter.digest for adapter in adapters]

    async def found():
        registry = open_kept()
        page = await registry.page("", 99)
        assert [published.read().digest for published in page] == [p.digest for p in page]
        return {p.name: digests.index(p.digest) for p in page}

    for num_done in kills:
        kept, begun = write_until_killed(str(open_kept.place), num_done)
        assert kept
        expected |= kept
        there = asyncio.run(found())
        if begun is not None and there.get(begun[0]) == begun[1]:
            expected[begun[0]] = begun[1]
        assert there == expected


def test_every_acknowledged_put_is_whole_after_kill_9(open_kept, adapters):
    check_kills(open_kept, adapters, (5, 23))


@pytest.mark.slow
def test_no_put_of_500_over_30_kills_is_lost(open_kept, adapters):
    check_kills(open_kept, adapters, [7 + 7 * n % 28 for n in range(30)])
