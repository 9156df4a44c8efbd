"""Files of tenants: what is kept, for whom, and how much of it."""

import asyncio
import errno
import os
import tempfile
from pathlib import Path

import pytest

from redmux.errors import (
    DataLossError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
)
from redmux_server.files import store as store_module
from redmux_server.files.records import Records
from redmux_server.files.store import FileStore, Room


@pytest.fixture(params=["folder", "memory"])
def folder(request, tmp_path):
    return tmp_path / "files" if request.param == "folder" else None


async def until(condition):
    while not condition():
        await asyncio.sleep(0.001)


async def content(store, file):
    assert b"".join([piece async for piece in store.pieces(file)]) == await store.read(file)
    return await store.read(file)


async def test_a_file_is_its_tenants_alone(folder):
    store = FileStore(folder)
    file = await store.put("a.jsonl", "batch", b"{}\n", "one")
    assert store.get(file.id, "one") is file
    assert await content(store, file) == b"{}\n"
    for tenant in ("two", "", "admin"):
        with pytest.raises(NotFoundError, match=file.id):
            store.get(file.id, tenant)
        with pytest.raises(NotFoundError):
            await store.delete(file.id, tenant)
        assert store.all_of(tenant) == []
    assert store.all_of("one") == [file]


async def test_lists_begin_with_the_newest(folder):
    store = FileStore(folder)
    files = [await store.put(f"{i}", "batch", b"x", "") for i in range(3)]
    assert store.all_of("") == files[::-1]
    assert len({file.id for file in files}) == 3


async def test_a_folder_brings_files_back_in_their_order_and_leaves_nothing_of_deleted_ones(
    tmp_path,
):
    store = FileStore(tmp_path)
    files = [await store.put(f"{i}.jsonl", "fine-tune", b"x" * (i + 1), "t") for i in range(3)]
    await store.delete(files[1].id, "t")
    again = FileStore(tmp_path)
    assert again.all_of("t") == [files[2], files[0]]
    assert await content(again, files[2]) == b"xxx"
    assert len(list(tmp_path.iterdir())) == 4


async def test_what_a_kill_left_half_done_is_no_file(tmp_path, caplog):
    store = FileStore(tmp_path)
    whole = await store.put("a", "batch", b"abc", "t")
    cut = await store.put("b", "batch", b"abc", "t")
    (tmp_path / f"{cut.id}.content").write_bytes(b"ab")
    (tmp_path / "file-without-record.content").write_bytes(b"x")
    (tmp_path / ".half.tmp").write_bytes(b"x")
    (tmp_path / "broken.json").write_bytes(b"{")
    again = FileStore(tmp_path)
    assert again.all_of("t") == [whole]
    assert cut.id in caplog.text
    assert "broken.json" in caplog.text
    left = {path.name for path in tmp_path.iterdir()}
    assert "file-without-record.content" not in left
    assert ".half.tmp" not in left


async def test_content_that_was_taken_away_is_told(tmp_path):
    store = FileStore(tmp_path)
    file = await store.put("a", "batch", b"abc", "t")
    (tmp_path / f"{file.id}.content").unlink()
    with pytest.raises(DataLossError, match=file.id):
        await store.read(file)
    with pytest.raises(DataLossError, match=file.id):
        await anext(store.pieces(file))


async def test_files_are_bounded_in_size_number_and_sum(folder, monkeypatch):
    monkeypatch.setattr(store_module, "MAX_FILE_BYTES", 8)
    store = FileStore(folder, Room(num_files=3, tenant_bytes=20, total_bytes=30))
    refused = {
        "is empty": b"",
        "has 9 bytes, the limit is 8": b"x" * 9,
    }
    for message, data in refused.items():
        with pytest.raises(InvalidArgumentError, match=message):
            await store.put("a", "batch", data, "one")
    with pytest.raises(InvalidArgumentError, match="filename"):
        await store.put("a\nb", "batch", b"x", "one")
    first = [await store.put("a", "batch", b"x" * 8, "one") for _ in range(2)]
    with pytest.raises(ResourceExhaustedError, match=r"have 16 bytes.* 5 more; limit 20"):
        await store.put("a", "batch", b"x" * 5, "one")
    await store.put("a", "batch", b"x" * 4, "one")
    with pytest.raises(ResourceExhaustedError, match="you have 3 files"):
        await store.put("a", "batch", b"x", "one")
    await store.put("a", "batch", b"x" * 8, "two")
    with pytest.raises(ResourceExhaustedError, match="of all callers have 28 bytes"):
        await store.put("a", "batch", b"x" * 8, "three")
    await store.delete(first[0].id, "one")
    await store.put("a", "batch", b"x" * 8, "three")


async def test_files_that_come_at_the_same_time_are_counted(tmp_path):
    store = FileStore(tmp_path, Room(num_files=2))
    puts = [store.put("a", "batch", b"x", "t") for _ in range(4)]
    results = await asyncio.gather(*puts, return_exceptions=True)
    assert sum(isinstance(result, ResourceExhaustedError) for result in results) == 2
    assert len(store.all_of("t")) == 2


async def test_a_file_that_is_read_stays_until_nobody_reads_it(folder):
    store = FileStore(folder)
    file = await store.put("a", "batch", b"x", "t")
    store.hold(file.id, "batch_1")
    store.hold(file.id, "batch_2")
    store.release(file.id, "batch_1")
    with pytest.raises(FailedPreconditionError, match="read by batch_2"):
        await store.delete(file.id, "t")
    store.release(file.id, "batch_2")
    await store.delete(file.id, "t")


@pytest.mark.parametrize(
    ("number", "error"),
    [(errno.ENOSPC, ResourceExhaustedError), (errno.EROFS, FailedPreconditionError)],
)
async def test_a_disk_that_refuses_is_told_without_its_path(tmp_path, monkeypatch, number, error):
    def refuse(*args, **options):
        raise OSError(number, os.strerror(number))

    store = FileStore(tmp_path)
    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    with pytest.raises(error, match="the server's data folder cannot be changed") as caught:
        await store.put("a", "batch", b"x", "t")
    assert str(tmp_path) not in caught.value.message
    assert store.all_of("t") == []
    monkeypatch.undo()
    await store.put("a", "batch", b"x", "t")


async def test_a_file_whose_record_finds_no_room_takes_none_itself(tmp_path, monkeypatch):
    store = FileStore(tmp_path)

    async def refuse(*args):
        raise ResourceExhaustedError("the disk is full")

    monkeypatch.setattr(Records, "write", refuse)
    with pytest.raises(ResourceExhaustedError):
        await store.put("a", "batch", b"x" * 1000, "t")
    assert list(tmp_path.iterdir()) == []


async def test_a_file_whose_caller_goes_away_while_it_is_deleted_leaves_nothing(tmp_path):
    store = FileStore(tmp_path)
    file = await store.put("a", "batch", b"x", "t")
    task = asyncio.create_task(store.delete(file.id, "t"))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: not list(tmp_path.iterdir()))
    assert store.all_of("t") == []


async def test_a_file_that_the_disk_does_not_let_go_stays(tmp_path, monkeypatch):
    store = FileStore(tmp_path)
    file = await store.put("a", "batch", b"x", "t")

    def refuse(*args, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(FailedPreconditionError, match=f"{file.id} is not deleted"):
        await store.delete(file.id, "t")
    monkeypatch.undo()
    assert await content(store, store.get(file.id, "t")) == b"x"


async def test_what_the_server_makes_replaces_itself_and_needs_no_room(folder):
    store = FileStore(folder, Room(num_files=1))
    for data in (b"one", b"other"):
        file = await store.keep("file-x", "out", "batch_output", data, "t")
        assert await content(store, file) == data
    assert len(store.all_of("t")) == 1


async def test_changes_of_a_record_are_kept_in_their_order_whoever_goes_away(tmp_path):
    records = Records(tmp_path, "thing")
    tasks = [
        asyncio.create_task(records.write("a", {"id": "a", "created_at": 0, "n": n}))
        for n in range(20)
    ]
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await records.write("b", {"id": "b", "created_at": -1, "n": 0})
    assert [record["n"] for record in Records(tmp_path, "thing").load()] == [0, 19]
