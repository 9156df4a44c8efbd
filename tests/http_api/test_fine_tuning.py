"""The fine-tuning loop of the openai package: send, train, wait, chat."""

import asyncio
import json
import re
from pathlib import Path

import openai
import pytest

pytestmark = pytest.mark.timeout(600)  # a process that trains has to import and to load


def talk(index, answer="no"):
    return {
        "messages": [
            {"role": "user", "content": f"{index}?"}, {"role": "assistant", "content": answer},
        ]
    }  # fmt: skip


def jsonl(lines):
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


@pytest.fixture
def send(api):
    async def send(lines, name="train.jsonl"):
        data = lines if isinstance(lines, bytes) else jsonl(lines)
        return (await api.files.create(file=(name, data), purpose="fine-tune")).id

    return send


@pytest.fixture
def ended(api):
    async def ended(job):
        while job.status not in ("succeeded", "failed", "cancelled"):
            await asyncio.sleep(0.05)
            job = await api.fine_tuning.jobs.retrieve(job.id)
        return job

    return ended


async def ask(api, model):
    answer = await api.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "3?"}], max_tokens=2, temperature=0
    )
    return answer.choices[0].message.content


async def test_what_a_job_has_trained_answers_at_once_under_its_name(api, http, send, ended, fits):
    assert await ask(api, "tiny") != "no"
    jobs = api.fine_tuning.jobs
    job = await jobs.create(
        model="tiny", training_file=await send([talk(i) for i in range(24)]),
        validation_file=await send([talk(i) for i in range(30, 34)], "valid.jsonl"),
        suffix="Say No", seed=3, metadata={"team": "a"},
        method={"type": "supervised", "supervised": {"hyperparameters": {
            "n_epochs": 4, "batch_size": 4, "learning_rate_multiplier": "auto",
        }}},
    )  # fmt: skip
    assert job.status == "validating_files"
    assert job.fine_tuned_model is None
    job = await ended(job)
    assert job.status == "succeeded", job.error
    assert job.fine_tuned_model == "say-no"
    assert job.trained_tokens > 0
    assert job.finished_at >= job.created_at
    assert job.method.supervised.hyperparameters.n_epochs == 4
    assert job.hyperparameters.learning_rate_multiplier == 1
    assert (job.seed, job.metadata) == (3, {"team": "a"})
    assert await ask(api, job.fine_tuned_model) == "no"
    assert (await api.models.retrieve("say-no")).id == "say-no"

    events = [event async for event in jobs.list_events(job.id, limit=7)]
    assert len({event.id for event in events}) == len(events)
    assert events[0].message == "The job has successfully completed"
    assert events[-1].message == f"Created fine-tuning job: {job.id}"
    metrics = [event.data for event in events if event.type == "metrics"]
    losses = {data["step"]: data["train_loss"] for data in metrics if "train_loss" in data}
    assert sorted(losses) == list(range(1, 25))
    assert losses[24] < losses[1]
    assert any(data.get("valid_loss") for data in metrics)
    (checkpoint,) = [item async for item in jobs.checkpoints.list(job.id)]
    assert checkpoint.fine_tuned_model_checkpoint == "say-no"
    assert checkpoint.metrics.full_valid_loss > 0
    document = (await http.get("/openapi.json")).json()
    for rest in ("", "/events", "/checkpoints"):
        told = document["paths"]["/v1/fine_tuning/jobs/{job_id}" + rest]["get"]
        fits(document, told, await http.get(f"/v1/fine_tuning/jobs/{job.id}{rest}"))
    (file_id,) = job.result_files
    rows = (await api.files.content(file_id)).text.splitlines()
    assert rows[0].startswith("step,train_loss")
    assert len(rows) == 26  # with an evaluation before the first step

    assert job.id in [listed.id async for listed in jobs.list(metadata={"team": "a"})]
    assert job.id not in [listed.id async for listed in jobs.list(metadata={"team": "b"})]
    with pytest.raises(openai.BadRequestError, match=r"is over \(succeeded\)"):
        await jobs.cancel(job.id)
    assert (await api.models.delete("say-no")).deleted
    with pytest.raises(openai.NotFoundError):
        await ask(api, "say-no")
    with pytest.raises(openai.PermissionDeniedError, match="base model"):
        await api.models.delete("tiny")


async def test_a_job_that_runs_is_cancelled(api, send, ended):
    job = await api.fine_tuning.jobs.create(
        model="tiny", training_file=await send([talk(i) for i in range(500)]), suffix="never",
        hyperparameters={"n_epochs": 50, "batch_size": 1},
    )  # fmt: skip
    while job.status != "running":
        await asyncio.sleep(0.02)
        job = await api.fine_tuning.jobs.retrieve(job.id)
    job = await api.fine_tuning.jobs.cancel(job.id)
    assert job.status == "cancelled"
    assert job.fine_tuned_model is None
    with pytest.raises(openai.NotFoundError):
        await ask(api, "never")


async def test_what_is_wrong_with_the_data_fails_the_job_by_its_lines(api, send, ended):
    lines = [talk(0), talk(1, answer=" "), talk(2), {"messages": []}, talk(3, answer="x" * 3000)]
    job = await api.fine_tuning.jobs.create(
        model="tiny", training_file=await send(jsonl(lines[:1]) + b"\n" + jsonl(lines[1:3])),
        validation_file=await send(lines[4:], "valid.jsonl"),
    )  # fmt: skip
    job = await ended(job)
    assert job.status == "failed"
    assert job.error.code == "invalid_training_file"
    assert job.error.param == "training_file"
    assert "train.jsonl:3: content is empty" in job.error.message
    assert "valid.jsonl:1: too long" in job.error.message
    job = await ended(
        await api.fine_tuning.jobs.create(model="tiny", training_file=await send(lines[3:4]))
    )
    assert "train.jsonl:1: messages has no message of the assistant" in job.error.message
    events = [event async for event in api.fine_tuning.jobs.list_events(job.id)]
    assert events[0].level == "error"


REFUSED = {
    "no base": ({"model": "none"}, 404, "model"),
    "an adapter": ({"model": "start"}, 400, "model"),
    "no file": ({"training_file": "file-none"}, 404, "training_file"),
    "none to validate": ({"validation_file": "file-none"}, 404, "validation_file"),
    "a method": ({"method": {"type": "dpo"}}, 400, "method.type"),
    "its options": ({"method": {"type": "supervised", "dpo": {"x": 1}}}, 400, "dpo"),
    "twice": ({"method": {"type": "supervised", "supervised": {"hyperparameters": {}}},
               "hyperparameters": {}}, 400, "hyperparameters"),
    "epochs": ({"hyperparameters": {"n_epochs": 0}}, 400, "hyperparameters.n_epochs"),
    "a text": ({"hyperparameters": {"n_epochs": "3"}}, 400, "hyperparameters.n_epochs"),
    "a batch": ({"hyperparameters": {"batch_size": 1.5}}, 400, "hyperparameters.batch_size"),
    "a rate": ({"hyperparameters": {"learning_rate_multiplier": -1}}, 400,
               "hyperparameters.learning_rate_multiplier"),
    "a field of them": ({"hyperparameters": {"beta": 1}}, 400, "hyperparameters.beta"),
    "integrations": ({"integrations": [{"type": "wandb"}]}, 400, "integrations"),
    "metadata": ({"metadata": {str(i): "" for i in range(17)}}, 400, "metadata"),
    "a seed": ({"seed": -1}, 400, "seed"),
    "a suffix": ({"suffix": "x" * 65}, 400, "suffix"),
    "a field": ({"colour": "red"}, 400, "colour"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
async def test_what_cannot_be_trained_is_refused_by_its_field(http, send, base, put, case):
    body, status, param = REFUSED[case]
    await put("start", base.adapter(5))
    right = {"model": "tiny", "training_file": await send([talk(0)]), "integrations": []}
    refused = await http.post("/v1/fine_tuning/jobs", json=right | body)
    assert refused.status_code == status, refused.text
    assert refused.json()["error"]["param"] == param


@pytest.mark.model
@pytest.mark.slow
async def test_the_documents_code_trains_the_default_model_and_runs_a_batch(start_server, capsys):
    server = await start_server(model="smollm2", adapters=("zoo",))
    text = (Path(__file__).parents[2] / "docs/fine_tuning.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", text, re.S | re.M))
    code = code.replace("localhost:8000", f"127.0.0.1:{server.http_port}")
    names = {}
    await asyncio.to_thread(exec, code, names)
    names["client"].close()
    first, *others = capsys.readouterr().out.splitlines()
    assert first.startswith("Arrr, ")
    assert {line[: len("question 0")] for line in others} >= {f"question {i}" for i in range(4)}
