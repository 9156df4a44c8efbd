"""Fine-tuning jobs: what is made of their files, and how their training is told."""

import asyncio
import json
import re

import pytest

from redmux.errors import (
    AlreadyExistsError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
)
from redmux_adapters.train import Evaluated, Stepped
from redmux_server.files.store import FileStore, Room
from redmux_server.registry.names import check_name
from redmux_server.training.job import Job, JobState, JobTask, TaskState
from redmux_server.tuning import data as data_module
from redmux_server.tuning import service as service_module
from redmux_server.tuning.data import read_dataset
from redmux_server.tuning.job import Hyperparameters, TuningJob
from redmux_server.tuning.service import TuningService


def said(role, content, **more):
    return {"role": role, "content": content} | more


def jsonl(*lines):
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


LINES = jsonl(*({"prompt": f"say {i}", "completion": "yes"} for i in range(32)))
TALK = [said("user", "a"), said("assistant", "b"), said("user", "c"), said("assistant", "d")]


class Training:
    """What TrainingService is to the jobs; the test trains itself."""

    def __init__(self):
        self.taken = set()
        self.error = None
        self.inline = {}
        self.jobs = {}
        self.checked = asyncio.Event()
        self.checked.set()

    def check_room(self, tenant):
        if self.error is not None and isinstance(self.error, ResourceExhaustedError):
            raise self.error

    async def default_learning_rate(self, tenant):
        return 0.01

    async def create(self, names, read, replace, request_id, tenant):
        (name,) = names
        if name in self.taken:
            raise AlreadyExistsError("tasks[0]: it exists")
        (self.inline[request_id],) = await asyncio.to_thread(read)
        await self.checked.wait()
        if self.error is not None:
            raise self.error
        job = Job(tenant, [JobTask(name, 10, 32, 2)], b"", replace, request_id)
        self.jobs[request_id] = job
        return job

    async def cancel(self, job_id, names, tenant):
        job = next(job for job in self.jobs.values() if job.id == job_id)
        job.end(JobState.CANCELLED)
        return job


class Rig:
    def __init__(self, folder=None, room=None):
        self.folder = folder
        self.room = room
        self.training = Training()

    async def open(self):
        def inside(name):
            return None if self.folder is None else self.folder / name

        self.files = FileStore(inside("files"), self.room)
        self.service = TuningService(self.training, self.files, inside("jobs"))
        await self.service.start()
        return self

    async def create(self, data=LINES, valid=None, suffix="mine", tenant="t", **chosen):
        file = await self.files.put("train.jsonl", "fine-tune", data, tenant)
        other = None
        if valid is not None:
            other = (await self.files.put("valid.jsonl", "fine-tune", valid, tenant)).id
        return await self.service.create(
            TuningJob(tenant, "base", file.id, other, suffix, Hyperparameters(**chosen), 7)
        )

    async def until(self, job, *statuses):
        async with asyncio.timeout(20):
            while job.status not in statuses:
                await asyncio.sleep(0)

    async def ended(self, job):
        async with asyncio.timeout(20):
            while job.id in self.service._tasks:
                await asyncio.sleep(0)
        return job

    async def queued(self, *args, **chosen):
        job = await self.create(*args, **chosen)
        await self.until(job, "queued", "failed")
        assert job.status == "queued", job.error
        return job, self.training.jobs[job.id]

    def succeed(self, trained):
        (task,) = trained.tasks
        trained.start()
        for step in range(1, 11):
            trained.progressed(Stepped(task.name, step, 10, 1 / step, 0.1, 1.0, 7))
        trained.progressed(Evaluated(task.name, 10, 0.5, 0.75, True))
        task.end(TaskState.COMPLETED)
        trained.end(JobState.FINISHED)


@pytest.fixture
async def rig(tmp_path):
    return await Rig(tmp_path).open()


async def test_a_job_goes_through_openais_states_and_tells_what_came_of_it(rig):
    rig.training.checked.clear()
    job = await rig.create(valid=LINES, suffix="Acme Corp!/My Model")
    assert job.status == "validating_files"
    rig.training.checked.set()
    await rig.until(job, "queued")
    trained = rig.training.jobs[job.id]
    trained.start()
    await rig.until(job, "running")
    rig.succeed(trained)
    await rig.ended(job)
    assert job.status == "succeeded"
    assert job.fine_tuned_model == "acme-corp-/my-model"
    assert job.trained_tokens == 70
    assert job.error is None
    assert job.checkpoint["step_number"] == 10
    assert job.checkpoint["metrics"]["full_valid_loss"] == 0.5
    file = rig.files.get(job.result_files[0], "t")
    assert file.purpose == "fine-tune-results"
    lines = (await rig.files.read(file)).decode().splitlines()
    assert lines[0] == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
    assert lines[1] == "1,1.0,,,"
    assert lines[10] == "10,0.1,,0.5,0.75"
    messages = [event["message"] for event in job.events]
    assert messages[0] == f"Created fine-tuning job: {job.id}"
    assert messages[-1] == "The job has successfully completed"
    assert "Step 3/10: training loss=0.3333" in messages


async def test_hyperparameters_become_options_and_auto_fits_the_data(rig):
    job, _ = await rig.queued(n_epochs=5, batch_size=4, learning_rate_multiplier=2.0)
    options = rig.training.inline[job.id].options
    assert options["epochs"] == 5
    assert options["batch_size"] == 4
    assert options["learning_rate"] == 0.02
    assert options["seed"] == 7
    assert options["valid_share"] == 0.0
    job, _ = await rig.queued(suffix="other")
    assert job.hyperparameters == Hyperparameters(3, 2, 1.0)


@pytest.mark.parametrize(
    ("num_examples", "epochs", "batch_size"),
    [(1, 25, 1), (10, 10, 1), (33, 3, 2), (100, 3, 6), (256, 3, 16), (99_999, 3, 16)],
)
def test_small_data_is_gone_through_more_often_in_smaller_batches(num_examples, epochs, batch_size):
    chosen = Hyperparameters()
    chosen.settle(num_examples)
    assert chosen == Hyperparameters(epochs, batch_size, 1.0)


async def test_a_name_that_is_taken_gets_an_ending_and_no_suffix_a_name_of_its_own(rig):
    rig.training.taken = {"mine", "team/mine"}
    for suffix in ("mine", "team/mine"):
        _, trained = await rig.queued(suffix=suffix)
        name = trained.tasks[0].name
        assert re.fullmatch(rf"{suffix}-[0-9a-f]{{8}}", name)
        check_name(name)
    _, trained = await rig.queued(suffix="")
    assert re.fullmatch(r"ft-[0-9a-f]{8}", trained.tasks[0].name)


@pytest.mark.parametrize("suffix", ["x" * 65, "a/b/c", "!!!", "/x"])
async def test_a_suffix_that_gives_no_name_is_refused(rig, suffix):
    with pytest.raises(InvalidArgumentError, match="suffix"):
        await rig.create(suffix=suffix)
    assert rig.service.all_of("t") == []


async def test_files_for_something_else_and_of_others_are_refused(rig):
    batch = await rig.files.put("a", "batch", LINES, "t")
    others = await rig.files.put("a", "fine-tune", LINES, "other")
    mine = await rig.files.put("a", "fine-tune", LINES, "t")
    for file, error in ((batch, InvalidArgumentError), (others, NotFoundError)):
        for pair in ((file.id, None), (mine.id, file.id)):
            with pytest.raises(error, match=file.id):
                await rig.service.create(TuningJob("t", "base", *pair, "x", Hyperparameters(), 0))


async def test_a_full_queue_and_full_files_are_told_at_once(tmp_path):
    rig = await Rig(tmp_path, Room(num_files=2)).open()
    await rig.queued()
    rig.training.error = ResourceExhaustedError("8 jobs wait")
    with pytest.raises(ResourceExhaustedError, match="8 jobs wait"):
        await rig.create()
    rig.training.error = None
    with pytest.raises(ResourceExhaustedError, match="2 files"):
        await rig.create(suffix="other")


async def test_what_is_wrong_with_a_file_fails_the_job_by_its_lines(rig):
    job = await rig.ended(await rig.create(b'{"prompt": "a", "completion": "b"}\n\n{\n[1]\n'))
    assert job.status == "failed"
    assert job.error["code"] == "invalid_training_file"
    assert job.error["param"] == "training_file"
    assert "train.jsonl:3: not valid JSON" in job.error["message"]
    assert "train.jsonl:4: not a JSON object" in job.error["message"]
    rig.training.error = InvalidArgumentError(
        "2 unusable:\ntasks[0].records[1]: too long\ntasks[0].valid[0]: empty\ntasks[0]: so"
    )
    data = jsonl({"messages": TALK})
    job = await rig.ended(await rig.create(b"\n" + data, valid=b"\n\n" + LINES))
    assert job.error["message"] == (
        "2 unusable:\ntrain.jsonl:2: too long\nvalid.jsonl:3: empty\nthe job: so"
    )
    assert job.error["param"] == "training_file"
    rig.training.error = InvalidArgumentError("tasks[0].valid[1]: too long")
    for valid, message in ((LINES, "valid.jsonl:2: too long"), (b"{", "valid.jsonl:1: not valid")):
        job = await rig.ended(await rig.create(data, valid=valid))
        assert message in job.error["message"]
        assert job.error["code"] == "invalid_validation_file"
        assert job.error["param"] == "validation_file"


async def test_training_that_fails_fails_the_job_in_its_words(rig):
    for state, detail in ((TaskState.DIVERGED, "the loss is nan"), (TaskState.FAILED, "killed")):
        job, trained = await rig.queued(suffix=state.value)
        trained.start()
        trained.tasks[0].end(state, detail)
        trained.end(JobState.FAILED)
        await rig.ended(job)
        assert job.status == "failed"
        assert job.error == {"code": "training_failed", "message": detail, "param": None}
        assert job.fine_tuned_model is None


async def test_a_job_is_cancelled_in_any_state_before_its_end(rig):
    rig.training.checked.clear()
    early = await rig.create(suffix="early")
    await rig.service.cancel(early.id, "t")
    assert early.status == "cancelled"
    rig.training.checked.set()
    await rig.ended(early)
    assert rig.training.jobs[early.id].state is JobState.CANCELLED
    late, trained = await rig.queued(suffix="late")
    trained.start()
    await rig.service.cancel(late.id, "t")
    assert late.status == "cancelled"
    assert late.finished_at is not None
    for job in (early, late):
        with pytest.raises(InvalidArgumentError, match="is over"):
            await rig.service.cancel(job.id, "t")


async def test_a_job_is_its_tenants_alone(rig):
    job, _ = await rig.queued()
    with pytest.raises(NotFoundError, match=job.id):
        rig.service.get(job.id, "other")
    with pytest.raises(NotFoundError):
        await rig.service.cancel(job.id, "other")
    assert rig.service.all_of("other") == []
    assert rig.service.all_of("t") == [job]


async def test_jobs_are_known_after_a_restart_and_have_failed_if_it_cut_them_short(rig):
    done, trained = await rig.queued(suffix="done")
    rig.succeed(trained)
    await rig.ended(done)
    open_job, _ = await rig.queued(suffix="open")
    await rig.service._write(open_job)  # behind what the job itself writes
    again = await Rig(rig.folder).open()
    assert [job.id for job in again.service.all_of("t")] == [open_job.id, done.id]
    same = again.service.get(done.id, "t")
    assert same.status == "succeeded"
    assert same.events == done.events
    assert same.hyperparameters == done.hyperparameters
    cut = again.service.get(open_job.id, "t")
    assert cut.status == "failed"
    assert cut.error["message"] == "the server ended before the job did"
    third = await Rig(rig.folder).open()
    assert third.service.get(open_job.id, "t").finished_at == cut.finished_at


async def test_ended_jobs_are_forgotten_when_there_are_many(rig, monkeypatch):
    monkeypatch.setattr(service_module, "_MOST_KEPT", 2)
    jobs = []
    for i in range(4):
        job, trained = await rig.queued(suffix=f"j{i}")
        rig.succeed(trained)
        jobs.append(await rig.ended(job))
    assert rig.service.all_of("t") == jobs[:0:-1]
    assert len(list(rig.folder.glob("jobs/*.json"))) == 3


def test_a_long_job_tells_steps_evenly():
    job = TuningJob("t", "base", "file-1", None, "", Hyperparameters(), 0)
    for step in range(1, 12_346):
        job.progressed(Stepped("x", step, 12_345, 1.0, 0.1, 1.0, 1), 12_345)
    steps = list(job.metrics())
    assert (steps[0], steps[-1]) == (1, 12_345)
    assert 190 < len(steps) < 210


def fields_of(data):
    return [record.fields for record in read_dataset("a.jsonl", data)]


def test_a_chat_teaches_each_message_of_the_assistant_that_has_weight():
    assert fields_of(jsonl({"messages": TALK})) == [{"messages": TALK[:2]}, {"messages": TALK}]
    silent = [TALK[0], TALK[1] | {"weight": 0}, *TALK[2:]]
    assert fields_of(jsonl({"messages": silent})) == [{"messages": TALK}]
    greeting = [said("assistant", "hi"), *TALK[:2]]
    assert fields_of(jsonl({"messages": greeting})) == [{"messages": greeting}]


def test_content_in_parts_is_one_text():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    (fields,) = fields_of(jsonl({"messages": [said("user", parts), said("assistant", "c")]}))
    assert fields["messages"][0]["content"] == "ab"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"messages": TALK, "tools": []}, "the line has tools, which training does not know"),
        ({"messages": [*TALK[:1], said("assistant", "", tool_calls=[])]}, r"\[1\] has tool_calls"),
        ({"messages": [*TALK[:1], said("assistant", "x", weight=2)]}, "weight is 2, must be 0 or"),
        ({"messages": [said("user", "x")]}, "no message of the assistant"),
        ({"messages": [*TALK[:1], said("assistant", "x", weight=0)]}, "no message of the assist"),
        ({"messages": TALK * 33}, "the chat has 132 messages, the limit is 128"),
        ({"prompt": "a", "completion": "b", "chosen": 1}, "the line has chosen"),
        ({"messages": TALK}, "the line is a chat, those before it are no chat"),
    ],
)
def test_what_training_would_ignore_is_refused_by_its_line(line, message):
    with pytest.raises(InvalidArgumentError, match=rf"a.jsonl:2: .*{message}"):
        read_dataset("a.jsonl", jsonl({"prompt": "a", "completion": "b"}, line))


def test_more_examples_than_a_job_may_have_are_refused_before_they_are_made(monkeypatch):
    monkeypatch.setattr(data_module, "MAX_RECORDS", 2)
    with pytest.raises(InvalidArgumentError, match=r"a.jsonl:2: .* 4 answers to learn; the limit"):
        read_dataset("a.jsonl", jsonl({"messages": TALK}) * 5)


def test_a_file_without_lines_is_refused():
    with pytest.raises(InvalidArgumentError, match="has no lines"):
        read_dataset("a.jsonl", b"\n")
