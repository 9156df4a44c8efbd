"""Jobs, their queue and their ends, with a process that the test plays itself."""

import asyncio
import json

import pytest

from redmux._job_calls import record_message
from redmux.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    ResourceExhaustedError,
    UnavailableError,
)
from redmux_adapters import to_bytes
from redmux_adapters.train.inline import InlineTask
from redmux_server.grpc_api.training import _record
from redmux_server.metrics import Metrics
from redmux_server.registry.names import check_name
from redmux_server.registry.tenants import OPERATOR
from redmux_server.training.job import Job, JobState, JobTask, TaskState, in_order_of_turns
from redmux_server.training.process import Message
from redmux_server.training.service import TrainingService

RECORDS = [{"prompt": "a", "completion": "b"}]


class FakeProcess:
    """What `TrainingProcess` is to the service; the test says what it tells."""

    def __init__(self):
        self.payload = None
        self.cancelled = []
        self.code = 0
        self._told = asyncio.Queue()
        self.tell("ready")

    def tell(self, event, data=b"", **fields):
        self._told.put_nowait(Message(event, fields, data))

    def step(self, name, step=1):
        self.tell(
            "stepped", task=name, step=step, num_steps=4, loss=1 / step, learning_rate=0.1,
            grad_norm=1.0, num_tokens=7,
        )  # fmt: skip

    def complete(self, name, adapter):
        self.tell("adapter", to_bytes(adapter), task=name, ending="completed")

    def leave(self, code=0):
        self.code = code
        self._told.put_nowait(None)

    async def send_job(self, setup, payload):
        self.payload = json.loads(payload)

    async def cancel(self, task):
        self.cancelled.append(task)

    async def messages(self):
        while (message := await self._told.get()) is not None:
            yield message

    async def give_way(self, is_busy, share):
        await asyncio.Event().wait()

    async def end(self):
        self.leave(self.code or -9)
        return self.code


class Rig:
    """A service over a small registry, and the processes it has started."""

    def __init__(self, registry, setup="on", max_queued=3):
        self.registry = registry
        self.processes = []
        self.metrics = Metrics()
        self.service = TrainingService(
            None, registry, self.metrics, max_queued=max_queued, share=0.5,
            is_busy=lambda: False, on_publish=lambda: None, start_process=self._start,
        )  # fmt: skip
        if setup:
            self.service._setup, self.service._checker = setup, self

    def check(self, inline):
        """Stands for the checker."""
        for item in inline:
            if not item.records:
                raise InvalidArgumentError("tasks[0]: there are no records")
        plans = [JobTask(item.name, 4, len(item.records), 0) for item in inline]
        return plans, json.dumps([item.name for item in inline]).encode()

    async def _start(self):
        self.processes.append(FakeProcess())
        return self.processes[-1]

    async def create(self, *names, tenant="me", replace=False, request_id="", records=RECORDS):
        return await self.service.create(
            names, lambda: [InlineTask(name, records) for name in names], replace, request_id,
            tenant,
        )  # fmt: skip

    def value(self, name, **labels):
        return self.metrics.registry.get_sample_value(f"redmux_training_{name}", labels)


@pytest.fixture
async def make_rig(open_registry):
    rigs = []

    def make(**options):
        rigs.append(Rig(open_registry(), **options))
        return rigs[-1]

    yield make
    for rig in rigs:
        await rig.service.stop()


@pytest.fixture
def rig(make_rig):
    return make_rig()


async def until(condition):
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0)


async def test_adapters_are_published_when_their_training_ends_well(rig, adapters):
    job = await rig.create("acme/a", "b")
    watching = asyncio.create_task(collect(job))
    await until(lambda: rig.processes and rig.processes[0].payload)
    (process,) = rig.processes
    assert process.payload == ["acme/a", "b"]
    process.step("acme/a")
    process.complete("acme/a", adapters[0])
    await until(lambda: job.tasks[0].digest)
    assert (await rig.registry.resolve("acme/a")).digest == adapters[0].digest
    assert job.state is JobState.RUNNING
    assert [task.state for task in job.tasks] == [TaskState.COMPLETED, TaskState.RUNNING]
    process.tell("diverged", task="b", detail="loss inf")
    process.leave()
    await job.ended.wait()
    assert (job.state, job.detail) == (JobState.FINISHED, "")
    first, second = job.tasks
    assert (first.digest, first.loss, first.num_tokens) == (adapters[0].digest, 1.0, 7)
    assert (second.state, second.detail, second.digest) == (TaskState.DIVERGED, "loss inf", "")
    assert not await rig.registry.has("b")
    seen = await watching
    assert seen[0] is seen[-1] is job
    assert [event.task for event in seen if event is not job] == ["acme/a"]
    assert rig.value("jobs_total", state="finished") == 1
    assert rig.value("tasks_total", state="completed") == 1
    assert rig.value("tasks_total", state="diverged") == 1
    assert rig.value("tokens_total") == 7
    assert rig.value("jobs_running") == 0


async def collect(job):
    return [event async for event in job.watch()]


async def test_a_process_that_dies_fails_its_job_with_the_reason_and_the_next_one_goes_on(
    rig, adapters
):
    first, second = await rig.create("a", "b"), await rig.create("c")
    await until(lambda: rig.processes and rig.processes[0].payload)
    rig.processes[0].complete("a", adapters[0])
    rig.processes[0].leave(-9)
    await first.ended.wait()
    assert first.state is JobState.FAILED
    assert first.detail == "the training process ended by SIGKILL"
    assert [task.state for task in first.tasks] == [TaskState.COMPLETED, TaskState.FAILED]
    await until(lambda: len(rig.processes) == 2)
    rig.processes[1].tell("failed", message="no pooler")
    rig.processes[1].leave(1)
    await second.ended.wait()
    assert (second.state, second.detail) == (JobState.FAILED, "no pooler")
    assert rig.value("jobs_total", state="failed") == 2


async def test_one_job_trains_at_a_time_and_tenants_take_turns(rig):
    names = {"x": ["x0", "x1", "x2"], "y": ["y0"], "z": ["z0"]}
    jobs = [await rig.create(name, tenant=tenant) for tenant in names for name in names[tenant]]
    order = []
    for number in range(5):
        await until(lambda number=number: len(rig.processes) > number)
        await until(lambda number=number: rig.processes[number].payload)
        order += rig.processes[number].payload
        assert rig.value("jobs_waiting") == 4 - number
        assert sum(job.state is JobState.RUNNING for job in jobs) == 1
        rig.processes[number].leave(1)
    assert order == ["x0", "y0", "z0", "x1", "x2"]


def test_the_tenant_whose_turn_is_longest_ago_is_next():
    jobs = [Job(tenant, [], b"", False) for tenant in "aaabbc"]
    assert "".join(job.tenant for job in in_order_of_turns(jobs, {})) == "abcaba"
    ordered = in_order_of_turns(jobs, {"a": 4, "c": 2, "b": 7})
    assert "".join(job.tenant for job in ordered) == "cababa"
    assert [job for job in ordered if job.tenant == "a"] == jobs[:3]


async def test_jobs_ahead_are_counted(rig):
    jobs = [await rig.create(f"a{i}", tenant="a") for i in range(3)]
    jobs.append(await rig.create("b", tenant="b"))
    await until(lambda: rig.processes and rig.processes[0].payload)
    assert [rig.service.num_ahead(job) for job in jobs] == [0, 2, 3, 1]


async def test_a_tenant_sees_and_ends_its_own_jobs_only(rig):
    mine, theirs = await rig.create("a"), await rig.create("b", tenant="other")
    assert rig.service.page("", 10, "me") == [mine]
    assert rig.service.get(theirs.id, "other") is theirs
    with pytest.raises(NotFoundError, match=theirs.id):
        rig.service.get(theirs.id, "me")
    with pytest.raises(NotFoundError):
        await rig.service.cancel(theirs.id, [], "me")
    assert theirs.state is JobState.QUEUED


async def test_pages_have_the_newest_jobs_first(rig):
    jobs = [await rig.create(f"a{i}") for i in range(3)]
    assert rig.service.page("", 2, "me") == [jobs[2], jobs[1]]
    assert rig.service.page(jobs[1].id, 2, "me") == [jobs[0]]


async def test_a_full_queue_refuses_its_tenant_and_no_other(rig):
    jobs = [await rig.create(f"a{i}") for i in range(4)]  # one trains
    with pytest.raises(ResourceExhaustedError, match="3 jobs wait already"):
        await rig.create("b")
    await rig.create("b", tenant="other")
    await rig.service.cancel(jobs[3].id, [], "me")
    await rig.create("c")


async def test_a_refused_job_leaves_its_place_in_the_queue(make_rig):
    rig = make_rig(max_queued=1)
    for _ in range(3):
        with pytest.raises(InvalidArgumentError, match="no records"):
            await rig.create("a", records=[])
    assert (await rig.create("a")).id


async def test_a_cancelled_job_ends_at_once_and_publishes_nothing(rig, adapters):
    running, queued = await rig.create("a", "b"), await rig.create("c")
    await until(lambda: rig.processes and rig.processes[0].payload)
    assert await rig.service.cancel(queued.id, [], "me") is queued
    assert await rig.service.cancel(running.id, [], "me") is running
    for job in (running, queued):
        assert job.state is JobState.CANCELLED
        assert {task.state for task in job.tasks} == {TaskState.CANCELLED}
    assert len(rig.processes) == 1
    assert len(rig.registry) == 0
    again = await rig.service.cancel(running.id, [], "me")
    assert again.state is JobState.CANCELLED
    assert rig.value("jobs_total", state="cancelled") == 2


async def test_a_cancelled_task_does_not_disturb_the_others(rig, adapters):
    job = await rig.create("a", "b")
    await until(lambda: rig.processes and rig.processes[0].payload)
    (process,) = rig.processes
    await rig.service.cancel(job.id, ["a"], "me")
    assert process.cancelled == ["a"]
    process.step("a")  # told before it heard
    process.complete("a", adapters[0])
    process.complete("b", adapters[1])
    process.leave()
    await job.ended.wait()
    assert job.state is JobState.FINISHED
    assert [task.state for task in job.tasks] == [TaskState.CANCELLED, TaskState.COMPLETED]
    assert job.tasks[0].step == 0
    assert [await rig.registry.has("a"), await rig.registry.has("b")] == [False, True]
    with pytest.raises(InvalidArgumentError, match="trains no adapter 'x'; it has a, b"):
        await rig.service.cancel(job.id, ["x"], "me")


async def test_a_task_that_is_cancelled_in_the_queue_is_not_trained(rig):
    _, second = await rig.create("a"), await rig.create("b", "c")
    await rig.service.cancel(second.id, ["b"], "me")
    await until(lambda: rig.processes)
    rig.processes[0].leave()
    await until(lambda: len(rig.processes) == 2 and rig.processes[1].payload)
    await until(lambda: rig.processes[1].cancelled)
    assert rig.processes[1].cancelled == ["b"]


async def test_names_that_are_taken_are_refused_unless_they_are_to_be_replaced(rig, adapters):
    await rig.registry.put("a", to_bytes(adapters[0]), "", False, "me")
    with pytest.raises(AlreadyExistsError, match=r"tasks\[1\]: adapter 'a' exists"):
        await rig.create("b", "a")
    job = await rig.create("a", replace=True)
    with pytest.raises(AlreadyExistsError, match=f"{job.id} trains adapter 'a' already"):
        await rig.create("a", replace=True)
    with pytest.raises(InvalidArgumentError, match=r"tasks\[1\]: adapter 'b' occurs twice"):
        await rig.create("b", "b")
    with pytest.raises(InvalidArgumentError, match=r"adapter name '\.\./up' is not valid"):
        await rig.create("../up")
    await until(lambda: rig.processes)
    rig.processes[0].complete("a", adapters[1])
    rig.processes[0].leave()
    await job.ended.wait()
    assert (await rig.registry.resolve("a")).digest == adapters[1].digest


@pytest.mark.parametrize(
    ("owner", "replace", "reason"),
    [
        ("me", False, "exists with other content"),
        ("somebody else", False, "the name 'acme/a' is taken"),
        ("somebody else", True, "no adapter 'acme/a' to replace"),
        (OPERATOR, True, "is the operator's"),
    ],
)
async def test_an_adapter_whose_name_was_taken_meanwhile_is_published_under_another(
    owner, replace, reason, rig, adapters
):
    job = await rig.create("acme/a", "b", replace=replace)
    await rig.registry.put("acme/a", to_bytes(adapters[0]), "", False, owner)
    await until(lambda: rig.processes)
    rig.processes[0].complete("acme/a", adapters[1])
    rig.processes[0].complete("b", adapters[2])
    rig.processes[0].leave()
    await job.ended.wait()
    failed, well = job.tasks
    assert failed.state is TaskState.FAILED
    assert reason in failed.detail
    assert failed.digest == adapters[1].digest
    assert well.state is TaskState.COMPLETED
    assert (await rig.registry.resolve("acme/a")).digest == adapters[0].digest
    kept = await rig.registry.resolve(failed.digest, "me")
    assert repr(kept.name) in failed.detail
    assert check_name(kept.name).startswith("acme/a-")
    assert kept.owner == "me"


async def test_an_adapter_that_cannot_be_published_is_a_failed_task(rig, adapters, monkeypatch):
    async def full(*args):
        raise ResourceExhaustedError("no space")

    job = await rig.create("a", "b")
    await until(lambda: rig.processes)
    monkeypatch.setattr(rig.registry, "put", full)
    rig.processes[0].complete("a", adapters[1])
    await until(lambda: job.tasks[0].has_ended)
    monkeypatch.undo()
    rig.processes[0].complete("b", adapters[1])
    rig.processes[0].leave()
    await job.ended.wait()
    assert job.tasks[0].state is TaskState.FAILED
    assert "could not be published: no space" in job.tasks[0].detail
    assert job.tasks[1].state is TaskState.COMPLETED


async def test_a_job_cannot_take_the_names_of_others(rig, adapters):
    await rig.registry.put("theirs", to_bytes(adapters[0]), "", False, "somebody else")
    await rig.registry.put("given", to_bytes(adapters[0]), "", False)
    with pytest.raises(NotFoundError, match=r"tasks\[1\]: no adapter 'theirs'"):
        await rig.create("a", "theirs", replace=True)
    with pytest.raises(AlreadyExistsError, match=r"tasks\[1\]: the name 'theirs' is taken"):
        await rig.create("a", "theirs")
    with pytest.raises(PermissionDeniedError, match=r"tasks\[0\]: adapter 'given'"):
        await rig.create("given", replace=True)
    assert rig.processes == []


async def test_a_call_that_is_repeated_returns_the_job_it_made(rig):
    job = await rig.create("a", request_id="x")
    assert await rig.create("a", request_id="x") is job
    other = await rig.create("b", request_id="x", tenant="other")
    assert other is not job
    with pytest.raises(InvalidArgumentError, match="request_id has 65 characters"):
        await rig.create("c", request_id="x" * 65)


async def test_a_server_that_stops_ends_all_jobs(rig):
    jobs = [await rig.create("a"), await rig.create("b")]
    await until(lambda: rig.processes and rig.processes[0].payload)
    await rig.service.stop()
    assert {(job.state, job.detail) for job in jobs} == {
        (JobState.FAILED, "the server was shut down")
    }
    assert len(rig.processes) == 1
    with pytest.raises((UnavailableError, RuntimeError)):
        await rig.create("c")


async def test_a_server_without_training_says_how_to_get_it(make_rig):
    rig = make_rig(setup=None)
    assert not rig.service.trains
    with pytest.raises(FailedPreconditionError, match="--training true"):
        await rig.create("a")


async def test_a_reader_that_is_slow_misses_steps_but_never_the_end(rig):
    job = await rig.create("a")
    events = job.watch()
    assert await anext(events) is job
    await until(lambda: rig.processes and rig.processes[0].payload)
    for step in range(1, 6000):
        rig.processes[0].step("a", step)
    await until(lambda: job.tasks[0].step == 5999)
    rig.processes[0].leave()
    await job.ended.wait()
    rest = [event async for event in events]
    assert rest[-1] is job
    assert 1 < len(rest) <= 4096


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "a", "completion": "b"},
        {"prompt": "a", "prompt_pair": "c", "completion": "b"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"text": "a", "label": "b"},
        {"text": "a", "text_pair": "c", "score": 0.5},
    ],
)
def test_a_record_arrives_as_it_was_sent(record):
    assert _record("tasks[0].records[0]", record_message(record)) == record
