"""Training jobs: what is sent for them and what is made of the answers."""

import json
from datetime import UTC, datetime

import pytest

import redmux
from redmux import InvalidArgumentError, NotFoundError, TrainingTask
from redmux.cli import main
from redmux.v1 import training_service_pb2 as pb

PAIR = {"prompt": "a", "completion": "b"}
TIME = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def test_a_job_is_sent_with_records_of_every_form(client, server):
    chat = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]}
    labels = [{"text": "x", "label": 3}, {"text": "y", "text_pair": "z", "label": "no", "id": 9}]
    two = {**PAIR, "prompt_pair": "c"}
    options = {
        "learning_rate": 0.02, "steps": 5, "labels": ["no", "3"],
        "prompt_format": {"user": ["<u>", ""], "assistant": ["<a>", ""]},
    }  # fmt: skip
    tasks = [
        TrainingTask("acme/pairs", [two], valid=[PAIR], options=options),
        TrainingTask("chat", [chat]),
        TrainingTask("labels", labels),
        TrainingTask("scores", [{"text": "x", "score": "2.5"}]),
    ]
    job = client.jobs.create(tasks, replace=True)
    assert (job.id, job.state, job.created_at, job.num_ahead) == ("job-0", "queued", TIME, 1)
    assert [task.adapter for task in job.tasks] == ["acme/pairs", "chat", "labels", "scores"]
    (call,) = server.seen("CreateJob")
    pairs, chats, labelled, scored = call.request.tasks
    assert call.request.replace
    assert [(r.pair.prompt, r.pair.completion) for r in (*pairs.records, *pairs.valid)] == [
        ("a", "b"), ("a", "b"),
    ]  # fmt: skip
    assert [r.pair.HasField("prompt_pair") for r in (*pairs.records, *pairs.valid)] == [True, False]
    assert (pairs.options.learning_rate, pairs.options.steps) == (0.02, 5)
    assert json.loads(pairs.options.prompt_format) == options["prompt_format"]
    assert not pairs.options.HasField("epochs")
    assert [m.content for m in chats.records[0].chat.messages] == ["q", "r"]
    assert [r.labelled.label for r in labelled.records] == ["3", "no"]
    assert [r.labelled.HasField("text_pair") for r in labelled.records] == [False, True]
    assert scored.records[0].scored.score == 2.5


def test_every_job_has_an_id_of_its_own_so_that_it_may_be_sent_twice(client, server):
    for _ in range(2):
        client.jobs.create([TrainingTask("a", [PAIR])])
    ids = {call.request.request_id for call in server.seen("CreateJob")}
    assert len(ids) == 2
    assert "" not in ids


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (("a", [PAIR, {"prompt": "x"}]), r"tasks\[0\].records\[1\]: completion is missing"),
        (("a", [{"prompt": 3, "completion": "x"}]), "prompt is int; it has to be a text"),
        (("a", [{"question": "x"}]), "has the fields question; known are prompt and completion"),
        (("a", ["x"]), r"records\[0\]: it is str; a record is a mapping"),
        (("a", [{"prompt": " ", "completion": "x"}]), "prompt is empty"),
        (("a", [{**PAIR, "prompt_pair": 1}]), "a field has a wrong type"),
        (("a", [{}, PAIR, 3]), r"(?s)2 unusable.*records\[0\].*records\[2\]"),
        (("a", "x"), "records is str; give a list"),
        (("a", [{"messages": [{"role": "user"}]}]), r"records\[0\]: messages\[0\]: a chat mess"),
        (("a", [{"text": "x", "score": "good"}]), r"records\[0\]: score is 'good', must be a num"),
        (("a", [{"text": "x", "score": 1, "text_pair": 3}]), "text_pair is 3, must be a text"),
        (("a", [{"messages": [{"role": "user", "content": 3}]}]), r"messages\[0\]: content is 3"),
        (("a", [PAIR], [{"label": 1}]), r"tasks\[0\].valid\[0\]: text is missing"),
        (("a", [PAIR], [], {"step": 3}), "unknown option 'step'; did you mean 'steps'"),
        (("a", [PAIR], [], {"steps": "many"}), r"tasks\[0\]: steps is 'many', must be a whole"),
        ((3, [PAIR]), "name is a text"),
    ],
)
def test_what_no_message_can_hold_is_refused_with_its_place(client, server, task, message):
    with pytest.raises(InvalidArgumentError, match=message):
        client.jobs.create([TrainingTask(*task)])
    assert not server.calls


def test_jobs_are_got_listed_and_cancelled(client, server):
    server.page_size = 2
    for number in range(5):
        client.jobs.create([TrainingTask(f"a{number}", [PAIR])])
    assert [job.id for job in client.jobs.list()] == [f"job-{n}" for n in range(5)]
    assert client.jobs.get("job-3").tasks[0].adapter == "a3"
    assert client.jobs.cancel("job-3", ["a3"]).state == "cancelled"
    assert list(server.seen("CancelJob")[0].request.adapters) == ["a3"]
    with pytest.raises(NotFoundError, match="job-9"):
        client.jobs.get("job-9")
    with pytest.raises(InvalidArgumentError, match="sequence of names"):
        client.jobs.cancel("job-3", "a3")


def finished(state=pb.TASK_STATE_COMPLETED, detail=""):
    best = pb.TrainingEvaluation(adapter="a", step=4, loss=1.5, accuracy=0.5, is_best=True)
    task = pb.JobTask(
        adapter="a", state=state, detail=detail, step=8, num_steps=8, loss=0.5, best=best,
        num_tokens=70, num_examples=9, digest="sha256:00",
    )  # fmt: skip
    return pb.Job(id="job-0", state=pb.JOB_STATE_FINISHED, tasks=[task])


@pytest.fixture
def events(server):
    step = pb.TrainingStep(adapter="a", step=8, num_steps=8, loss=0.5, learning_rate=0.01)
    evaluation = pb.TrainingEvaluation(adapter="a", step=8, loss=1.25, accuracy=0.5, is_best=True)
    server.job_events = [
        pb.WatchJobResponse(job=server.job("job-0", "a")),
        pb.WatchJobResponse(step=step),
        pb.WatchJobResponse(evaluation=evaluation),
        pb.WatchJobResponse(),  # of a kind that a newer server may have
        pb.WatchJobResponse(job=finished()),
    ]
    return server.job_events


def test_a_job_is_watched_to_its_end(client, server, events):
    first, step, evaluation, last = client.jobs.watch("job-0")
    assert (first.state, first.has_ended, first.tasks[0].best) == ("queued", False, None)
    assert step == redmux.TrainingStep("a", 8, 8, 0.5, 0.01, 0.0, 0)
    assert evaluation == redmux.TrainingEvaluation("a", 8, 1.25, 0.5, True)
    assert (last.state, last.has_ended, last.is_success) == ("finished", True, True)
    assert last.tasks[0].digest == "sha256:00"
    assert last.tasks[0].best.accuracy == 0.5
    assert server.seen("WatchJob")[0].time_remaining_s > 86_400


@pytest.fixture
def run(target, capsys):
    def run(*arguments):
        code = main(["jobs", *arguments, "--target", target])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_create_sends_a_file_and_the_options_that_are_given(run, server, tmp_path):
    (tmp_path / "d.jsonl").write_text(json.dumps(PAIR) + "\n\n" + json.dumps(PAIR) + "\n")
    data = str(tmp_path / "d.jsonl")
    code, out, _ = run("create", "acme/a", data, "--steps", "7", "--learning-rate", "0.01")
    assert code == 0
    assert out == "id: job-0\nstate: queued\nacme/a queued 0/8\n"
    (task,) = server.seen("CreateJob")[0].request.tasks
    assert (task.adapter, len(task.records)) == ("acme/a", 2)
    assert task.options == pb.TrainingOptions(steps=7, learning_rate=0.01)


def test_create_sends_the_tasks_of_a_job_file(run, server, tmp_path):
    (tmp_path / "d.csv").write_text("question,completion\na,b\nc,d\n")
    (tmp_path / "job.toml").write_text(
        '[defaults]\nsteps = 3\ncolumns = {prompt = "question"}\n'
        '[[tasks]]\nname = "one"\ndata = "d.csv"\n'
        '[[tasks]]\nname = "two"\ndata = "d.csv"\nvalid = "d.csv"\nsteps = 4\n'
    )
    assert run("create", "--job", str(tmp_path / "job.toml"), "--seed", "5")[0] == 0
    one, two = server.seen("CreateJob")[0].request.tasks
    assert [r.pair.prompt for r in one.records] == ["a", "c"]
    assert (one.options.steps, two.options.steps, two.options.seed) == (3, 4, 5)
    assert (len(one.valid), len(two.valid)) == (0, 2)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("d.jsonl", "{}\n{broken", "d.jsonl:2: not valid JSON"),
        ("d.jsonl", "[1]", "d.jsonl:1: not a JSON object"),
        ("d.jsonl", "\n", "has no records"),
        ("d.csv", "prompt,completion\na\n", "d.csv:2: 1 columns, the header has 2"),
        ("d.json", "[\n{},\n{}\n]", "d.json is one JSON array"),
        ("d.parquet", "x", "cannot tell the format"),
    ],
)
def test_a_file_that_holds_no_records_is_refused(run, server, tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    code, _, err = run("create", "a", str(tmp_path / name))
    assert code == 5
    assert message in err
    assert not server.calls


def test_create_tells_all_unusable_lines_at_once(run, server, tmp_path):
    lines = [
        json.dumps(PAIR), "{broken", "[1]", "", json.dumps({"prompt": "a"}), json.dumps(PAIR),
        json.dumps({**PAIR, "completion": " "}), json.dumps({"question": "a"}),
    ]  # fmt: skip
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    (tmp_path / "v.jsonl").write_text(json.dumps({**PAIR, "prompt": 3}))
    files = str(tmp_path / "d.jsonl"), "--valid", str(tmp_path / "v.jsonl")
    code, _, err = run("create", "a", *files)
    assert code == 5
    first, *told = err.splitlines()
    assert first == "redmux: 6 unusable record(s) in the training data:"
    expected = [
        "d.jsonl:2: not valid JSON: ",
        "d.jsonl:3: not a JSON object",
        "d.jsonl:5: completion is missing",
        "d.jsonl:7: completion is empty",
        "d.jsonl:8: it has the fields question; known are ",
        "v.jsonl:1: prompt is int; it has to be a text",
    ]
    assert [line[: len(start)] for line, start in zip(told, expected, strict=True)] == expected
    assert not server.calls


def test_what_the_server_refuses_is_told_by_file_and_line(run, tmp_path, monkeypatch):
    def refuse(self, tasks, **options):
        raise InvalidArgumentError(
            "2 unusable record(s):\ntasks[0].records[1]: too long\ntasks[1].valid[0]: too long"
        )

    monkeypatch.setattr(redmux.Jobs, "create", refuse)
    (tmp_path / "d.jsonl").write_text(f"{json.dumps(PAIR)}\n\n{json.dumps(PAIR)}\n")
    task = 'data = "d.jsonl"\nvalid = "d.jsonl"\n'
    (tmp_path / "job.toml").write_text(
        f'[[tasks]]\nname = "a"\n{task}[[tasks]]\nname = "b"\n{task}'
    )
    code, _, err = run("create", "--job", str(tmp_path / "job.toml"))
    assert code == 5
    assert err.splitlines()[1:] == ["d.jsonl:3: too long", "d.jsonl:1: too long"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tasks = 3", "no list of tasks"),
        ('output = "x"\ntasks = []', "the key 'output', which is the server's"),
        ('tasks = [{name = "a"}]', "the data None; give both"),
        ("tasks = [", "neither valid TOML nor JSON"),
    ],
)
def test_mistakes_in_a_job_file_are_told(run, tmp_path, text, message):
    (tmp_path / "job.toml").write_text(text)
    code, _, err = run("create", "--job", str(tmp_path / "job.toml"))
    assert code == 5
    assert message in err


def test_watch_tells_evaluations_and_ends_and_whether_all_went_well(run, server, events):
    code, out, _ = run("watch", "job-0")
    assert code == 0
    assert out.splitlines() == [
        "queued, 1 ahead",
        "a step 8 of 8: loss 0.5000",
        "a step 8: held out 1.2500, accuracy 50.0 %, best so far",
        "a completed at step 8 of 8, sha256:00",
        "job finished",
    ]
    diverged = finished(pb.TASK_STATE_DIVERGED, "loss inf at step 8")
    events[-1] = pb.WatchJobResponse(job=diverged)
    code, out, _ = run("watch", "job-0")
    assert code == 1
    assert "a diverged at step 8 of 8, sha256:00: loss inf at step 8" in out


def test_json_has_a_line_per_event(run, events):
    code, out, _ = run("watch", "job-0", "--json")
    kinds = [json.loads(line)["event"] for line in out.splitlines()]
    assert code == 0
    assert kinds == ["Job", "TrainingStep", "TrainingEvaluation", "Job"]


async def test_the_jobs_themselves_are_iterated_over(target, server):
    server.page_size = 2
    server.jobs = {name: server.job(name, "a") for name in "xyz"}
    with redmux.Client(target) as client:
        assert [job.id for job in client.jobs] == ["x", "y", "z"]
    async with redmux.AsyncClient(target) as client:
        assert [job.id async for job in client.jobs] == ["x", "y", "z"]


def test_list_is_a_table(run, server):
    server.jobs = {"job-0": server.job("job-0", "a", "b")}
    assert run("list")[1].splitlines() == [
        "ID     STATE   CREATED           ADAPTERS",
        "job-0  queued  2026-01-02 03:04  a queued 0/8, b queued 0/8",
    ]
    assert run("cancel", "job-0", "a")[1].startswith("id: job-0\nstate: cancelled\n")
