"""Batches with answers that the test gives itself: each line once, whatever happens."""

import asyncio
import json
import threading
from collections import Counter

import msgspec
import pytest

from redmux.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
)
from redmux_server.batches import lines as lines_module
from redmux_server.batches import service as service_module
from redmux_server.batches.batch import Batch
from redmux_server.batches.journal import Entry, Journal
from redmux_server.batches.lines import LineReader
from redmux_server.batches.service import BatchService, Reply
from redmux_server.files.store import FileStore, Room

CHATS = "/v1/chat/completions"
DAY_S = 86400.0


def line(custom_id, **changes):
    return {
        "custom_id": custom_id, "method": "POST", "url": CHATS, "body": {"say": custom_id},
    } | changes  # fmt: skip


def jsonl(*lines):
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


class Rig:
    """A service over a store, whose answers wait until they are let go."""

    def __init__(self, folder=None, num_at_once=4, room=None):
        self.folder = folder
        self.room = room
        self.num_at_once = num_at_once
        self.asked = []
        self.now = self.most = 0
        self.replies = {}  # what is said -> replies, one after the other
        self.stuck = set()  # what is said to have no answer
        self.gate = asyncio.Event()
        self.gate.set()

    async def open(self):
        def inside(name):
            return None if self.folder is None else self.folder / name

        self.files = FileStore(inside("files"), self.room)
        self.service = BatchService(self.files, inside("batches"), self.num_at_once)
        await self.service.start(self.answer)
        return self

    async def answer(self, endpoint, body, tenant, request_id):
        said = json.loads(body)["say"]
        self.asked.append(said)
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await (asyncio.Event() if said in self.stuck else self.gate).wait()
            await asyncio.sleep(0)
        finally:
            self.now -= 1
        if self.replies.get(said):
            return self.replies[said].pop(0)
        usage = {
            "prompt_tokens": 3, "completion_tokens": 2,
            "prompt_tokens_details": {"cached_tokens": 1},
        }  # fmt: skip
        return Reply(200, msgspec.json.encode({"said": said, "usage": usage}))

    async def create(self, *lines, tenant="t", window_s=DAY_S, endpoint=CHATS, data=None):
        data = jsonl(*lines) if data is None else data
        file = await self.files.put("in.jsonl", "batch", data, tenant)
        return await self.service.create(endpoint, file.id, window_s, "24h", {}, tenant)

    async def restart(self):
        """Goes on as a process does that was killed."""
        await self.service.stop()
        await self.open()

    async def lines_of(self, file_id, tenant="t"):
        if file_id is None:
            return []
        data = await self.files.read(self.files.get(file_id, tenant))
        return [json.loads(text) for text in data.splitlines()]

    async def outcome(self, batch):
        """Waits for the end; returns the ids in the output file and those in that of errors."""
        while batch.id in self.service._tasks:
            await asyncio.sleep(0)
        assert batch.has_ended
        found = []
        for file_id in (batch.output_file_id, batch.error_file_id):
            found.append(sorted(item["custom_id"] for item in await self.lines_of(file_id)))
        return found


@pytest.fixture(params=["folder", "memory"])
def folder(request, tmp_path):
    return tmp_path if request.param == "folder" else None


async def test_every_line_is_answered_once_and_counted(folder):
    rig = await Rig(folder).open()
    error = {"error": {"message": "no"}}
    rig.replies["b"] = [Reply(404, msgspec.json.encode(error))]
    batch = await rig.create(line("a"), line("b"), line("c"))
    assert batch.status == "validating"
    assert await rig.outcome(batch) == [["a", "c"], ["b"]]
    assert batch.status == "completed"
    assert (batch.num_lines, batch.num_completed, batch.num_failed) == (3, 2, 1)
    assert (batch.num_input_tokens, batch.num_cached_tokens, batch.num_output_tokens) == (6, 2, 4)
    output = {item["custom_id"]: item for item in await rig.lines_of(batch.output_file_id)}
    assert output["a"]["response"]["body"]["said"] == "a"
    assert output["a"]["error"] is None
    (failed,) = await rig.lines_of(batch.error_file_id)
    assert failed["response"]["status_code"] == 404
    assert failed["response"]["body"] == error
    assert rig.files.get(batch.output_file_id, "t").purpose == "batch_output"
    if folder is not None:
        assert not list(folder.glob("batches/*.answers"))


async def test_no_more_lines_run_at_a_time_than_are_allowed_over_all_batches():
    rig = await Rig(num_at_once=3).open()
    rig.gate.clear()
    batches = [
        await rig.create(*(line(f"{tenant}{i}") for i in range(5)), tenant=tenant)
        for tenant in ("one", "two")
    ]
    while len(rig.asked) < 3:
        await asyncio.sleep(0)
    for _ in range(50):
        await asyncio.sleep(0)
    assert len(rig.asked) == 3
    rig.gate.set()
    for batch in batches:
        while not batch.has_ended:
            await asyncio.sleep(0)
    assert rig.most == 3
    assert Counter(rig.asked) == Counter(f"{t}{i}" for t in ("one", "two") for i in range(5))


async def test_a_line_that_finds_no_place_is_asked_again():
    rig = await Rig().open()
    rig.replies["a"] = [Reply(429, b"{}", 0.0), Reply(503, b"{}", 0.0)]
    batch = await rig.create(line("a"))
    assert await rig.outcome(batch) == [["a"], []]
    assert rig.asked == ["a"] * 3


FAULTS = {
    "no JSON": (b"{", "invalid_json_line", None),
    "no object": (b"[1]", "invalid_json_line", None),
    "not UTF-8": (b'{"custom_id": "\xff"}', "invalid_json_line", None),
    "a field is missing": (jsonl({"custom_id": "a"}), "invalid_json_line", None),
    "an unknown field": (jsonl(line("b", more=1)), "invalid_json_line", None),
    "a body that is none": (jsonl(line("b", body=3)), "invalid_json_line", None),
    "an empty id": (jsonl(line("")), "invalid_custom_id", "custom_id"),
    "a long id": (jsonl(line("x" * 513)), "invalid_custom_id", "custom_id"),
    "an id twice": (jsonl(line("a")), "duplicate_custom_id", "custom_id"),
    "another method": (jsonl(line("b", method="GET")), "invalid_method", "method"),
    "another endpoint": (jsonl(line("b", url="/v1/embeddings")), "mismatched_url", "url"),
    "a stream": (jsonl(line("b", body={"stream": True})), "invalid_stream", "body.stream"),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_faulty_line_fails_the_batch_by_its_number_before_anything_runs(fault):
    text, code, param = FAULTS[fault]
    rig = await Rig().open()
    batch = await rig.create(data=jsonl(line("a")) + b"\n" + text)
    assert await rig.outcome(batch) == [[], []]
    assert batch.status == "failed"
    (error,) = batch.errors
    assert (error["code"], error["line"], error["param"]) == (code, 3, param)
    assert rig.asked == []


def test_a_mark_of_utf_8_before_the_first_line_is_no_part_of_it():
    lines, faults = LineReader(CHATS).read(b"\xef\xbb\xbf" + jsonl(line("a")))
    assert ([read.custom_id for read in lines], faults) == (["a"], [])


def test_a_file_without_requests_or_with_too_many_is_faulty(monkeypatch):
    read = LineReader(CHATS).read
    assert read(b"\n \n")[1][0].code == "empty_file"
    monkeypatch.setattr(lines_module, "MAX_LINES", 2)
    assert read(jsonl(*(line(f"{i}") for i in range(3)))) == (
        [], [("too_many_lines", "there are more than 2 requests", None, None)]
    )  # fmt: skip
    monkeypatch.setattr(lines_module, "MAX_LINE_BYTES", 20)
    assert read(jsonl(line("a")))[1][0].code == "line_too_long"
    assert len(read(b"{\n" * 1000)[1]) == 50


async def test_what_is_no_batch_is_refused_at_once(monkeypatch):
    rig = await Rig(room=Room(num_files=3)).open()
    file = await rig.files.put("in", "batch", jsonl(line("a")), "t")
    other = await rig.files.put("in", "fine-tune", jsonl(line("a")), "t")
    create = rig.service.create
    with pytest.raises(InvalidArgumentError, match="endpoint is '/v1/models'"):
        await create("/v1/models", file.id, DAY_S, "24h", {}, "t")
    with pytest.raises(InvalidArgumentError, match="was sent for fine-tune"):
        await create(CHATS, other.id, DAY_S, "24h", {}, "t")
    with pytest.raises(NotFoundError):
        await create(CHATS, file.id, DAY_S, "24h", {}, "other")
    monkeypatch.setattr(service_module, "_MOST_OPEN", 1)
    rig.gate.clear()
    batch = await create(CHATS, file.id, DAY_S, "24h", {}, "t")
    with pytest.raises(ResourceExhaustedError, match="1 batches are open"):
        await create(CHATS, file.id, DAY_S, "24h", {}, "t")
    rig.gate.set()
    await rig.outcome(batch)
    with pytest.raises(ResourceExhaustedError, match="3 files"):  # with that of the answers
        await create(CHATS, file.id, DAY_S, "24h", {}, "t")


async def test_a_batch_is_its_tenants_alone():
    rig = await Rig().open()
    batch = await rig.create(line("a"))
    with pytest.raises(NotFoundError, match=batch.id):
        rig.service.get(batch.id, "other")
    with pytest.raises(NotFoundError):
        await rig.service.cancel(batch.id, "other")
    assert rig.service.all_of("other") == []
    await rig.outcome(batch)
    with pytest.raises(NotFoundError):
        rig.files.get(batch.output_file_id, "other")


async def test_a_cancelled_batch_keeps_its_answers_and_tells_of_the_rest(folder):
    rig = await Rig(folder, num_at_once=2).open()
    rig.stuck = {"2", "3"}
    batch = await rig.create(*(line(f"{i}") for i in range(6)))
    while batch.num_completed < 2:
        await asyncio.sleep(0)
    cancelling = await rig.service.cancel(batch.id, "t")
    assert cancelling.status in ("cancelling", "finalizing", "cancelled")
    assert await rig.outcome(batch) == [["0", "1"], ["2", "3", "4", "5"]]
    assert batch.status == "cancelled"
    for item in await rig.lines_of(batch.error_file_id):
        assert item["error"]["code"] == "batch_cancelled"
        assert item["response"] is None
    with pytest.raises(InvalidArgumentError, match="is cancelled"):
        await rig.service.cancel(batch.id, "t")


async def test_cancelling_at_any_moment_ends_with_every_line_once(folder):
    for num_turns in range(0, 120, 3):
        rig = await Rig(folder if folder is None else folder / str(num_turns), num_at_once=2).open()
        batch = await rig.create(*(line(f"{i}") for i in range(4)))
        for _ in range(num_turns):
            await asyncio.sleep(0)
        if batch.status in ("validating", "in_progress"):
            await rig.service.cancel(batch.id, "t")
        async with asyncio.timeout(20):
            output, errors = await rig.outcome(batch)
        assert batch.status in ("cancelled", "completed")
        assert sorted(output + errors) == [f"{i}" for i in range(4)]


async def test_what_is_not_done_in_time_is_told(folder):
    rig = await Rig(folder).open()
    rig.gate.clear()
    batch = await rig.create(line("a"), line("b"), window_s=0.05)
    assert await rig.outcome(batch) == [[], ["a", "b"]]
    assert batch.status == "expired"
    assert {item["error"]["code"] for item in await rig.lines_of(batch.error_file_id)} == {
        "batch_expired"
    }


async def test_a_batch_goes_on_after_a_restart_where_it_was(tmp_path):
    rig = await Rig(tmp_path, num_at_once=1).open()
    rig.stuck = {"3"}
    batch = await rig.create(*(line(f"{i}") for i in range(6)))
    while batch.num_completed < 3:
        await asyncio.sleep(0)
    rig.stuck = set()
    await rig.restart()
    again = rig.service.get(batch.id, "t")
    assert again is not batch
    output, errors = await rig.outcome(again)
    assert (output, errors) == ([f"{i}" for i in range(6)], [])
    assert again.num_completed == 6
    assert again.num_input_tokens == 18
    assert Counter(rig.asked) == Counter(["0", "1", "2", "3", "3", "4", "5"])


async def test_restarts_at_any_moment_lose_and_repeat_nothing(tmp_path):
    for num_turns in range(0, 200, 5):
        rig = await Rig(tmp_path / str(num_turns), num_at_once=2).open()
        batch = await rig.create(*(line(f"{i}") for i in range(4)))
        for _ in range(num_turns):
            await asyncio.sleep(0)
        await rig.restart()
        again = rig.service.get(batch.id, "t")
        async with asyncio.timeout(20):
            assert await rig.outcome(again) == [[f"{i}" for i in range(4)], []]
        assert again.status == "completed"
        outputs = [f for f in rig.files.all_of("t") if f.purpose == "batch_output"]
        assert [f.id for f in outputs] == [again.output_file_id]


async def test_a_kill_between_the_files_of_a_batch_makes_none_of_them_twice(tmp_path, monkeypatch):
    rig = await Rig(tmp_path).open()
    rig.replies["b"] = [Reply(404, b"{}")]
    has_kept = asyncio.Event()
    keep = FileStore.keep

    async def keep_one(self, *args):
        if has_kept.is_set():
            await asyncio.Event().wait()
        await keep(self, *args)
        has_kept.set()

    monkeypatch.setattr(FileStore, "keep", keep_one)
    data = jsonl(line("a"), line("b"))
    file = await keep(rig.files, "file-in", "in.jsonl", "batch", data, "t")
    batch = await rig.service.create(CHATS, file.id, DAY_S, "24h", {}, "t")
    await has_kept.wait()
    assert batch.status == "finalizing"
    monkeypatch.undo()
    await rig.restart()
    again = rig.service.get(batch.id, "t")
    assert await rig.outcome(again) == [["a"], ["b"]]
    made = {file.id for file in rig.files.all_of("t") if file.purpose == "batch_output"}
    assert made == {again.output_file_id, again.error_file_id}


async def test_an_answer_that_is_being_written_when_its_line_is_given_up_is_there(
    tmp_path, monkeypatch
):
    begun, goes_on = threading.Event(), threading.Event()
    append = Journal._append

    def slow(self, written):
        begun.set()
        goes_on.wait(20)
        append(self, written)

    monkeypatch.setattr(Journal, "_append", slow)
    journal = Journal(tmp_path / "a.answers")
    entry = Entry.of(b'{"custom_id":"a","response":null}', is_output=True)
    adding = asyncio.create_task(journal.add(entry))
    await asyncio.to_thread(begun.wait, 20)
    adding.cancel()
    with pytest.raises(asyncio.CancelledError):
        await adding
    loading = asyncio.create_task(journal.load())
    for _ in range(5):
        await asyncio.sleep(0)
    goes_on.set()
    assert await loading == [entry]


async def test_a_batch_whose_time_ran_out_meanwhile_keeps_what_it_has(tmp_path):
    rig = await Rig(tmp_path).open()
    rig.stuck = {"b"}
    batch = await rig.create(line("a"), line("b"))
    while batch.num_completed < 1:
        await asyncio.sleep(0)
    await rig.service.stop()
    (tmp_path / "batches" / "batch_of_before.answers").write_bytes(b"")
    path = tmp_path / "batches" / f"{batch.id}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"expires_at": 1.0}))
    await rig.open()
    again = rig.service.get(batch.id, "t")
    assert await rig.outcome(again) == [["a"], ["b"]]
    assert again.status == "expired"
    assert not list(tmp_path.glob("batches/*.answers"))


async def test_a_batch_whose_file_is_gone_fails(tmp_path):
    rig = await Rig(tmp_path).open()
    rig.gate.clear()
    batch = await rig.create(line("a"))
    with pytest.raises(FailedPreconditionError, match=batch.id):
        await rig.files.delete(batch.input_file_id, "t")
    await rig.service.stop()
    for path in tmp_path.glob("files/*"):
        path.unlink()
    await rig.open()
    again = rig.service.get(batch.id, "t")
    await rig.outcome(again)
    assert again.status == "failed"
    assert batch.input_file_id in again.errors[0]["message"]


async def test_answers_without_room_are_told_and_end_the_batch(monkeypatch):
    monkeypatch.setattr(service_module, "MAX_OUTPUT_BYTES", 400)
    rig = await Rig(num_at_once=1).open()
    batch = await rig.create(*(line(f"{i}") for i in range(9)))
    output, errors = await rig.outcome(batch)
    assert batch.status == "completed"
    assert 0 < len(output) < 9
    assert sorted(output + errors) == [f"{i}" for i in range(9)]
    assert len(rig.asked) == len(output)
    assert {item["error"]["code"] for item in await rig.lines_of(batch.error_file_id)} == {
        "batch_output_too_large"
    }


async def test_an_error_of_the_server_fails_the_batch_by_an_id():
    rig = await Rig().open()
    rig.replies["a"] = ["no reply"]
    batch = await rig.create(line("a"))
    await rig.outcome(batch)
    assert batch.status == "failed"
    assert "internal error, id" in batch.errors[0]["message"]


@pytest.mark.parametrize("torn", [b"+", b'+{"custom_id": "b', b"\0\0\0\n", b"+{}\n", b"x{}\n"])
async def test_a_journal_is_cut_behind_its_last_whole_answer(tmp_path, torn):
    path = tmp_path / "a.answers"
    journal = Journal(path)
    entry = Entry.of(b'{"custom_id":"a","response":null}', is_output=True)
    await journal.add(entry)
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    again = Journal(path)
    assert await again.load() == [entry]
    assert path.read_bytes() == whole
    assert again.num_bytes == journal.num_bytes == len(whole)


async def test_ended_batches_are_forgotten_when_there_are_many(tmp_path, monkeypatch):
    monkeypatch.setattr(service_module, "_MOST_KEPT", 2)
    rig = await Rig(tmp_path).open()
    batches = []
    for i in range(5):
        batches.append(await rig.create(line(f"{i}")))
        await rig.outcome(batches[-1])
    assert rig.service.all_of("t") == batches[:1:-1]
    assert len(list(tmp_path.glob("batches/*.json"))) == 3


def test_a_record_holds_all_of_a_batch():
    batch = Batch("t", CHATS, "file-1", "24h", 1.0)
    assert Batch(**json.loads(json.dumps(service_module.asdict(batch)))).id == batch.id
