"""/v1/batches as the openai package asks for them."""

import asyncio
import json

import openai
import pytest


@pytest.fixture
def batch_of(api):
    """Sends lines as a file and returns the batch over it."""

    async def batch_of(*lines, endpoint="/v1/chat/completions", **options):
        data = "".join(json.dumps(line) + "\n" for line in lines).encode()
        file = await api.files.create(file=("in.jsonl", data), purpose="batch")
        return await api.batches.create(
            input_file_id=file.id, endpoint=endpoint, completion_window="24h", **options
        )

    return batch_of


@pytest.fixture
def outcome(api):
    """Waits for the end of a batch; returns it and its answers by custom_id."""

    async def outcome(batch):
        while batch.status not in ("completed", "failed", "expired", "cancelled"):
            await asyncio.sleep(0.01)
            batch = await api.batches.retrieve(batch.id)
        answers = {}
        for file_id in filter(None, (batch.output_file_id, batch.error_file_id)):
            for line in (await api.files.content(file_id)).text.splitlines():
                answer = json.loads(line)
                assert answer["custom_id"] not in answers
                answers[answer["custom_id"]] = answer
        return batch, answers

    return outcome


def line(custom_id, body, url="/v1/chat/completions"):
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": "tiny"} | body}


def chat(text, **more):
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 4} | more


async def test_answers_of_a_batch_are_those_of_its_endpoint(http, batch_of, outcome, base, put):
    await put("mine", base.adapter(1))
    bodies = {
        "base": chat("hi"), "adapter": chat("hi", model="mine"),
        "sampled": chat("hi", temperature=1.0, seed=3, n=2, logprobs=True),
        "no such model": chat("hi", model="none"), "no such field": chat("hi", colour="red"),
        "no messages": {"max_tokens": 3}, "too large": chat("hi", max_tokens=10_000),
    }  # fmt: skip
    batch = await batch_of(*(line(*pair) for pair in bodies.items()), metadata={"a": "b"})
    assert batch.status == "validating"
    assert batch.metadata == {"a": "b"}
    batch, answers = await outcome(batch)
    assert batch.status == "completed"
    assert batch.errors is None
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (7, 3, 4)
    assert answers.keys() == bodies.keys()
    for custom_id, body in bodies.items():
        response = answers[custom_id]["response"]
        assert response["request_id"] == answers[custom_id]["id"]
        asked = await http.post("/v1/chat/completions", json={"model": "tiny"} | body)
        told = asked.json()
        assert response["status_code"] == asked.status_code
        if asked.is_error:
            assert response["body"] == told
            continue
        assert response["body"]["choices"] == told["choices"]
        assert response["body"]["redmux"]["digest"] == told["redmux"]["digest"]
    assert batch.usage.output_tokens == 4 + 4 + 8
    assert batch.usage.total_tokens == batch.usage.input_tokens + 16


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 3}),
     ("/v1/embeddings", {"input": ["a", "b"], "encoding_format": "base64"})],
)  # fmt: skip
async def test_other_endpoints_have_batches_too(http, batch_of, outcome, endpoint, body):
    batch = await batch_of(line("x", body, endpoint), endpoint=endpoint)
    batch, answers = await outcome(batch)
    asked = (await http.post(endpoint, json={"model": "tiny"} | body)).json()
    found = answers["x"]["response"]["body"]
    for name in ("choices", "data"):
        assert found.get(name) == asked.get(name)
    assert batch.usage.input_tokens == asked["usage"]["prompt_tokens"]


async def test_a_batch_leaves_rows_for_others_and_lets_them_go_first(api, batch_of, server):
    busy = [line(f"{i}", chat("x", max_tokens=200, ignore_eos=True)) for i in range(40)]
    batch = await batch_of(*busy)
    most = 0
    for _ in range(5):
        await api.chat.completions.create(model="tiny", messages=[], extra_body=chat("y"))
        most = max(most, server.engine.num_open)
    assert 0 < most <= server.config.max_running // 2
    batch = await api.batches.cancel(batch.id)
    assert batch.status in ("cancelling", "finalizing", "cancelled")
    while batch.status != "cancelled":
        await asyncio.sleep(0.01)
        batch = await api.batches.retrieve(batch.id)
    counts = batch.request_counts
    assert counts.completed + counts.failed == counts.total == 40
    with pytest.raises(openai.BadRequestError, match="cannot be cancelled"):
        await api.batches.cancel(batch.id)


async def test_a_faulty_file_is_told_by_its_lines(api, batch_of, outcome):
    batch, answers = await outcome(await batch_of(line("a", {}), line("a", {})))
    assert batch.status == "failed"
    assert answers == {}
    (error,) = batch.errors.data
    assert (error.code, error.line, error.param) == ("duplicate_custom_id", 2, "custom_id")


async def test_batches_are_listed_in_pages(api, batch_of):
    batches = [await batch_of(line("a", {})) for _ in range(3)]
    listed = [batch.id async for batch in api.batches.list(limit=1)]
    assert listed[:3] == [batch.id for batch in batches][::-1]


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"completion_window": "1d"}, 400, "completion_window"),
        ({"completion_window": "999h"}, 400, "completion_window"),
        ({"endpoint": "/v1/responses"}, 400, "endpoint"),
        ({"input_file_id": "file-none"}, 404, "input_file_id"),
        ({"input_file_id": None}, 400, "input_file_id"),
        ({"output_expires_after": {"anchor": "created_at"}}, 400, "output_expires_after"),
        ({"metadata": {"a": 1}}, 400, "metadata.a"),
        ({"metadata": {"a" * 65: "b"}}, 400, "metadata"),
        ({"colour": "red"}, 400, "colour"),
    ],
)
async def test_what_is_no_batch_is_refused_by_its_field(api, http, body, status, param):
    file = await api.files.create(file=("in.jsonl", b"{}"), purpose="batch")
    right = {
        "input_file_id": file.id, "endpoint": "/v1/chat/completions", "completion_window": "24h",
    }  # fmt: skip
    refused = await http.post("/v1/batches", json=right | body)
    assert refused.status_code == status, refused.text
    assert refused.json()["error"]["param"] == param
