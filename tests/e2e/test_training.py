"""Training on a running server, with its real process."""

import asyncio
import os
import signal
import sys
from contextlib import aclosing

import psutil
import pytest
import torch
from encoders import save_tiny_encoder
from training.tiny_tasks import furthest

from redmux import (
    AsyncClient,
    FailedPreconditionError,
    InvalidArgumentError,
    Job,
    NotFoundError,
    ResourceExhaustedError,
    TrainingEvaluation,
    TrainingStep,
    TrainingTask,
)
from redmux_adapters import to_bytes
from redmux_adapters.train import Trainer, load_training_base
from redmux_adapters.train.inline import InlineTask, make_inline_tasks
from redmux_server.training.process import TrainingProcess

YES = [{"prompt": f"say {i}", "completion": "yes" * (i % 3 + 1)} for i in range(20)]
NO = [
    {
        "messages": [
            {"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "no"},
        ]
    }
    for i in range(16)
]  # fmt: skip
LONG = {"steps": 100_000, "batch_size": 1, "valid_share": 0.0}
pytestmark = pytest.mark.timeout(600)  # a process that trains has to import and to load


def trained_by_the_library(folder, tasks, kind="causal"):
    base = load_training_base(str(folder), kind, torch.float32)
    trainer = Trainer(base, make_inline_tasks(base, tasks))
    while trainer.active:
        trainer.step()
    trainer.close()
    return [trainer.adapter(task.name) for task in tasks]


async def test_adapters_come_out_as_the_library_trains_them_while_streams_do_not_notice(
    start_server, tiny_folder, tmp_path
):
    server = await start_server(data_dir=str(tmp_path), training_share=0.5)
    options = {"steps": 12, "batch_size": 4, "eval_every": 6, "prompt_format": "raw"}
    async with AsyncClient(f"127.0.0.1:{server.port}") as client:
        prompts = [f"prompt {i}" for i in range(4)]

        async def generate_all():
            calls = (client.generate(p, max_tokens=60, ignore_eos=True) for p in prompts)
            return [completion.token_ids for completion in await asyncio.gather(*calls)]

        alone = await generate_all()
        tasks = [
            TrainingTask("acme/yes", YES, options=options),
            TrainingTask("no", NO, valid=NO[:2], options={"steps": 8, "seed": 3}),
        ]
        job = await client.jobs.create(tasks)
        watching = asyncio.create_task(collect(client.jobs.watch(job.id)))
        await until(lambda: server.training.get(job.id, "").tasks[0].step > 0)
        num_beside = 0
        while not server.training.get(job.id, "").ended.is_set():
            assert await generate_all() == alone
            num_beside += 1
        assert num_beside > 0

        events = await watching
        last = events[-1]
        assert (last.state, last.is_success) == ("finished", True)
        steps = [e.step for e in events if isinstance(e, TrainingStep) and e.adapter == "no"]
        assert steps == list(range(1, 9))
        judged = [e for e in events if isinstance(e, TrainingEvaluation) and e.adapter != "no"]
        assert [e.step for e in judged] == [0, 6, 12]
        assert judged[-1].loss < judged[0].loss

        inline = [InlineTask(t.adapter, t.records, t.valid, t.options) for t in tasks]
        expected = await asyncio.to_thread(trained_by_the_library, tiny_folder, inline)
        for task, adapter in zip(last.tasks, expected, strict=True):
            published = await server.registry.resolve(task.adapter)
            assert published.digest == task.digest
            assert furthest(await server.registry.fetch(published), adapter) < 1e-5
        await client.adapters.put("offline", to_bytes(expected[0]))
        ours, theirs = [
            await client.generate("say 3", adapter=name, max_tokens=8, ignore_eos=True)
            for name in ("acme/yes", "offline")
        ]
        assert ours.token_ids == theirs.token_ids
        assert ours.token_ids != (await client.generate("say 3", max_tokens=8)).token_ids
        assert {a.name async for a in client.adapters.list()} == {"acme/yes", "no", "offline"}
    await server.stop(drain_s=0)
    server = await start_server(data_dir=str(tmp_path))
    assert (await server.registry.resolve("acme/yes")).digest == last.tasks[0].digest


async def test_an_encoder_learns_to_classify_pairs_and_to_score(start_server, tmp_path_factory):
    folder = save_tiny_encoder(tmp_path_factory.mktemp("bert"), "bert")
    server = await start_server(model=str(folder))
    texts = [(f"text {c}", f"{c if i % 2 else '?'}" * 6) for i, c in enumerate("abcdefghijklmnop")]
    pairs = [
        {"text": text, "text_pair": pair, "label": "other" if "?" in pair else "same"}
        for text, pair in texts
    ]
    scored = [{"text": "z" * n, "score": n / 10} for n in range(1, 11)]
    options = {"steps": 200, "batch_size": 8, "valid_share": 0.0}
    tasks = [
        TrainingTask("pairs", pairs, options=options | {"labels": ["same", "other"]}),
        TrainingTask("length", scored, options=options),
    ]
    async with AsyncClient(f"127.0.0.1:{server.port}") as client:
        job = await client.jobs.create(tasks)
        last = (await collect(client.jobs.watch(job.id)))[-1]
        assert (last.state, last.is_success) == ("finished", True)
        classified = await client.classify(texts, adapter="pairs")
        assert classified.labels == ("same", "other")
        got = [max(zip(r.scores, r.labels, strict=True))[1] for r in classified.results]
        assert got == [pair["label"] for pair in pairs]
        lengths = await client.classify([item["text"] for item in scored], adapter="length")
        assert lengths.problem_type == "regression"
        (short,), (long,) = lengths.results[0].scores, lengths.results[-1].scores
        assert long - short > 0.3

        inline = [InlineTask(t.adapter, t.records, t.valid, t.options) for t in tasks]
        expected = await asyncio.to_thread(trained_by_the_library, folder, inline, "classifier")
        for task, adapter in zip(last.tasks, expected, strict=True):
            served = await server.registry.fetch(await server.registry.resolve(task.adapter))
            assert furthest(served, adapter) < 1e-4
            assert served.head.config == adapter.head.config
            for name, tensor in adapter.head.tensors.items():
                assert torch.allclose(served.head.tensors[name], tensor, atol=1e-4)

        with pytest.raises(InvalidArgumentError, match="this base model is an encoder"):
            await client.jobs.create([TrainingTask("a", YES)])


async def collect(events):
    return [event async for event in events]


async def until(condition):
    async with asyncio.timeout(300):
        while not condition():
            await asyncio.sleep(0.01)


def process_of(server):
    """The process that trains now."""
    return psutil.Process(server.training._running[1]._process.pid)


async def started(server, client, *names):
    """A long job that has taken its first step."""
    job = await client.jobs.create([TrainingTask(name, YES, options=LONG) for name in names])
    await until(lambda: server.training.get(job.id, "").tasks[0].step > 0)
    return job


async def test_a_training_process_that_is_killed_fails_its_job_and_nothing_else(start_server):
    server = await start_server()
    async with AsyncClient(f"127.0.0.1:{server.port}") as client:
        expected = await client.generate("abc", max_tokens=20)
        job = await started(server, client, "a")
        process_of(server).send_signal(signal.SIGKILL)
        last = (await collect(client.jobs.watch(job.id)))[-1]
        assert (last.state, last.detail) == (
            "failed", "the training process ended by SIGKILL",
        )  # fmt: skip
        assert last.tasks[0].state == "failed"
        assert await client.generate("abc", max_tokens=20) == expected
        assert await client.health() == "serving"

        # The next job is trained; one of its adapters is given up, then all of it.
        job = await started(server, client, "a", "b")
        process = process_of(server)
        left = await client.jobs.cancel(job.id, ["a"])
        assert [task.state for task in left.tasks] == ["cancelled", "running"]
        before = server.training.get(job.id, "").tasks[1].step
        await until(lambda: server.training.get(job.id, "").tasks[1].step > before + 2)
        assert (await client.jobs.cancel(job.id)).state == "cancelled"
        assert not process.is_running()
        assert [a async for a in client.adapters.list()] == []

        job = await started(server, client, "a")
        process = process_of(server)
        watching = asyncio.create_task(collect(client.jobs.watch(job.id)))
        await asyncio.sleep(0.1)
        await server.training.stop()
        assert not process.is_running()
        assert (await watching)[-1].detail == "the server was shut down"
        assert await client.generate("abc", max_tokens=20) == expected


async def test_what_cannot_be_trained_is_refused_before_anything_starts(start_server):
    server = await start_server(training_max_tokens=5000)
    cases = [
        ([*YES, {"prompt": "x", "completion": ""}], {}, InvalidArgumentError,
         r"tasks\[0\].records\[20\]: completion is empty"),
        ([*YES, {"prompt": "x" * 600, "completion": "y"}], {"steps": 1, "valid_share": 0.0},
         InvalidArgumentError, r"tasks\[0\].records\[20\]: too long: "),
        (YES, {"steps": -1}, InvalidArgumentError, r"tasks\[0\]: steps is -1"),
        (YES, {"prompt_format": "{"}, InvalidArgumentError, "prompt_format is not valid JSON"),
        (YES, {"steps": 10_000}, ResourceExhaustedError, "the limit is 5000"),
        ([{"text": "x", "label": "y"}], {}, InvalidArgumentError, "this base model is a decoder"),
    ]  # fmt: skip
    async with AsyncClient(f"127.0.0.1:{server.port}") as client:
        for records, options, error, message in cases:
            with pytest.raises(error, match=message):
                await client.jobs.create([TrainingTask("a", records, options=options)])
        large = [{"prompt": "x" * (17 << 20), "completion": "y"}]
        with pytest.raises(ResourceExhaustedError, match="this method takes at most 16777216"):
            await client.jobs.create([TrainingTask("a", large)])
        assert [job async for job in client.jobs.list()] == []
        assert (await client.info()).trains
    assert server.training._running is None


async def test_a_key_sees_its_own_jobs_only(start_server):
    server = await start_server(api_keys=("one", "two"))
    target = f"127.0.0.1:{server.port}"
    async with AsyncClient(target, api_key="one") as one, AsyncClient(target, api_key="two") as two:
        job = await one.jobs.create([TrainingTask("a", YES, options=LONG)])
        assert [j.id async for j in one.jobs.list()] == [job.id]
        assert [j async for j in two.jobs.list()] == []
        for call in (two.jobs.get, two.jobs.cancel):
            with pytest.raises(NotFoundError, match=job.id):
                await call(job.id)
        with pytest.raises(NotFoundError, match=job.id):
            await collect(two.jobs.watch(job.id))
        cancelled = await one.jobs.cancel(job.id)
        assert isinstance(cancelled, Job)
        assert cancelled.state == "cancelled"


async def test_a_server_may_leave_training_out(start_server):
    server = await start_server(training=False)
    async with AsyncClient(f"127.0.0.1:{server.port}") as client:
        assert not (await client.info()).trains
        with pytest.raises(FailedPreconditionError, match="--training true"):
            await client.jobs.create([TrainingTask("a", YES)])


@pytest.mark.parametrize("is_busy", [True, False])
async def test_training_is_stopped_for_most_of_the_time_while_requests_run(monkeypatch, is_busy):
    process = await TrainingProcess.start()
    signals = []
    clock = asyncio.get_running_loop().time
    monkeypatch.setattr(os, "kill", lambda pid, number: signals.append((clock(), number)))
    try:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.0):
                await process.give_way(lambda: is_busy, 0.2)
    finally:
        monkeypatch.undo()
        await process.end()
    stops = [number == signal.SIGSTOP for _, number in signals]
    if not is_busy:
        assert len(stops) > 1
        assert not any(stops)
        return
    assert stops == [index % 2 == 1 for index in range(len(stops))]
    times = [time for time, _ in signals]
    ran = sum(times[i + 1] - times[i] for i in range(0, len(times) - 2, 2))
    assert ran / (times[-2 if len(times) % 2 == 0 else -1] - times[0]) < 0.25


@pytest.mark.slow
async def test_training_does_not_outlive_a_server_that_is_killed(tiny_folder):
    serving = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "redmux", "serve", "--model", str(tiny_folder), "--port", "0",
        "--http-port", "0", "--metrics-port", "0", stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        while b"serving" not in (line := await serving.stderr.readline()):
            assert line
        target = line.decode().split(" on ")[1].split(",")[0]
        async with AsyncClient(target) as client:
            job = await client.jobs.create([TrainingTask("a", YES, options=LONG)])
            async with aclosing(client.jobs.watch(job.id)) as events:
                async for event in events:
                    if isinstance(event, TrainingStep):
                        break
            (child,) = psutil.Process(serving.pid).children()
            child.suspend()
            serving.kill()
        await serving.wait()
        await until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
    finally:
        if serving.returncode is None:
            serving.kill()
            await serving.wait()
