"""Files, batches and jobs in a data folder, of real processes that are killed."""

import asyncio
import contextlib
import json
import signal

import openai
import pytest
from serve_process import Process

ENDS = ("completed", "failed", "expired", "cancelled")
KEYS = ("first-key-of-a", "first-key-of-b")


@pytest.fixture
def serve(tiny_folder, tmp_path):
    """Starts servers on one data folder; gives a client of each."""

    @contextlib.asynccontextmanager
    async def serve(*flags):
        flags = ("--data-dir", str(tmp_path / "data"), *flags)
        names = ("--served-model-name", "tiny")
        async with Process("--model", str(tiny_folder), *names, *flags) as server:
            address = await server.tells(r"serving .* HTTP on port (\d+),")
            url = f"http://{address}/v1"
            async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as api:
                yield server, api

    return serve


def line(index):
    body = {
        "model": "tiny", "messages": [{"role": "user", "content": f"{index}"}], "max_tokens": 150,
        "ignore_eos": True,
    }  # fmt: skip
    return {
        "custom_id": f"line {index}", "method": "POST", "url": "/v1/chat/completions", "body": body
    }  # fmt: skip


async def kill(server):
    server.process.send_signal(signal.SIGKILL)
    await server.process.wait()


async def test_a_batch_goes_on_after_kill_9_and_answers_every_line_once(serve, tmp_path):
    lines = [line(index) for index in range(60)]
    data = "".join(json.dumps(item) + "\n" for item in lines).encode()
    slow = ("--max-running", "4", "--max-batch-tokens", "8")  # two lines at a time
    async with serve(*slow) as (server, api):
        file = await api.files.create(file=("in.jsonl", data), purpose="batch")
        batch = await api.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
        while batch.request_counts.completed < 6:
            await asyncio.sleep(0.005)
            batch = await api.batches.retrieve(batch.id)
        assert batch.status == "in_progress"
        await kill(server)
    (journal,) = tmp_path.glob("data/batches/*.answers")
    before = [text[1:] for text in journal.read_bytes().split(b"\n")[:-1]]
    assert 6 <= len(before) < 60
    with journal.open("ab") as torn:
        torn.write(b'+{"id": "cut')
    async with serve(*slow) as (server, api):
        batch = await api.batches.retrieve(batch.id)
        while batch.status not in ENDS:
            await asyncio.sleep(0.02)
            batch = await api.batches.retrieve(batch.id)
        assert batch.status == "completed"
        assert batch.request_counts.completed == batch.request_counts.total == 60
        assert batch.error_file_id is None
        output = (await api.files.content(batch.output_file_id)).content.splitlines()
        assert output[: len(before)] == before
        ids = [json.loads(text)["custom_id"] for text in output]
        assert sorted(ids) == sorted(item["custom_id"] for item in lines)
        assert batch.usage.output_tokens == 60 * 150
        await kill(server)
    async with serve() as (_, api):
        assert (await api.batches.retrieve(batch.id)).to_dict() == batch.to_dict()
        assert (await api.files.content(file.id)).content == data
        assert (await api.files.content(batch.output_file_id)).content.splitlines() == output


@pytest.mark.parametrize(
    ("number", "message"),
    [(signal.SIGKILL, "the server ended before the job did"),
     (signal.SIGTERM, "the server was shut down")],
)  # fmt: skip
@pytest.mark.slow
async def test_a_job_that_an_end_cut_short_has_failed_and_batches_go_on(serve, number, message):
    row = {"prompt": "a", "completion": "b"}
    async with serve() as (server, api):
        data = (json.dumps(row) + "\n").encode() * 100
        file = await api.files.create(file=("in.jsonl", data), purpose="fine-tune")
        job = await api.fine_tuning.jobs.create(model="tiny", training_file=file.id)
        requests = "".join(json.dumps(line(index)) + "\n" for index in range(40)).encode()
        batch = await api.batches.create(
            input_file_id=(
                await api.files.create(file=("in.jsonl", requests), purpose="batch")
            ).id,
            endpoint="/v1/chat/completions", completion_window="24h",
        )  # fmt: skip
        while batch.status == "validating":
            await asyncio.sleep(0.005)
            batch = await api.batches.retrieve(batch.id)
        server.process.send_signal(number)
        code, _ = await server.ended()
        assert code == (0 if number is signal.SIGTERM else -number)
    async with serve() as (_, api):
        job = await api.fine_tuning.jobs.retrieve(job.id)
        assert job.status == "failed"
        assert job.error.message == message
        while batch.status not in ENDS:
            await asyncio.sleep(0.02)
            batch = await api.batches.retrieve(batch.id)
        assert batch.request_counts.completed == 40
        assert (await api.files.retrieve(file.id)).bytes == len(data)


@pytest.mark.slow
async def test_two_servers_on_one_data_folder_are_refused(serve, tiny_folder, tmp_path):
    async with serve() as (server, _):
        flags = ("--model", str(tiny_folder), "--data-dir", str(tmp_path / "data"))
        async with Process(*flags) as second:
            code, text = await second.ended()
        assert code != 0
        assert f"data_dir: {tmp_path / 'data'} belongs to another server" in text
        assert f"pid {server.process.pid}" in text


async def test_files_batches_and_jobs_are_their_keys_alone(start_server):
    server = await start_server(api_keys=KEYS, served_model_name=("tiny",), admin_key="admin-key")
    url = f"http://127.0.0.1:{server.http_port}/v1"
    async with contextlib.AsyncExitStack() as stack:
        mine, other, admin = [
            await stack.enter_async_context(
                openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0)
            )
            for key in (*KEYS, "admin-key")
        ]
        data = json.dumps(line(0) | {"custom_id": "a"}).encode()
        file = await mine.files.create(file=("a.jsonl", data), purpose="batch")
        rows = await mine.files.create(
            file=("b.jsonl", b'{"prompt": "a", "completion": "b"}\n'), purpose="fine-tune"
        )
        batch = await mine.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
        job = await mine.fine_tuning.jobs.create(model="tiny", training_file=rows.id)
        while batch.status not in ENDS:
            await asyncio.sleep(0.01)
            batch = await mine.batches.retrieve(batch.id)
        jobs = mine.fine_tuning.jobs
        while not (done := await jobs.retrieve(job.id)).finished_at:
            await asyncio.sleep(0.05)
        assert done.status == "succeeded", done.error
        for who in (other, admin):
            asked = {
                "file": who.files.retrieve(file.id),
                "content": who.files.content(batch.output_file_id),
                "deletion": who.files.delete(file.id),
                "batch": who.batches.retrieve(batch.id),
                "its cancellation": who.batches.cancel(batch.id),
                "a batch over it": who.batches.create(
                    input_file_id=file.id, endpoint="/v1/chat/completions",
                    completion_window="24h",
                ),
                "job": who.fine_tuning.jobs.retrieve(job.id),
                "its events": who.fine_tuning.jobs.list_events(job.id),
                "its checkpoints": who.fine_tuning.jobs.checkpoints.list(job.id),
                "its end": who.fine_tuning.jobs.cancel(job.id),
                "a job over it": who.fine_tuning.jobs.create(model="tiny", training_file=rows.id),
            }  # fmt: skip
            for asking in asked.values():
                with pytest.raises(openai.NotFoundError):
                    await asking
            for listing in (who.files, who.batches, who.fine_tuning.jobs):
                assert [item async for item in listing.list()] == []
        with pytest.raises(openai.NotFoundError):
            await other.models.retrieve(done.fine_tuned_model)
        assert (await mine.models.retrieve(done.fine_tuned_model)).id == done.fine_tuned_model
