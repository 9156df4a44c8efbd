"""What docs/http.md promises; its code is run by tests/test_documents.py."""

import asyncio
import json
import re
from pathlib import Path

import jsonschema
import pytest

from redmux_adapters import to_bytes
from redmux_server.descriptors import _MAX_CONNECTIONS
from redmux_server.http_api import gate
from redmux_server.http_api.connection import Limits
from redmux_server.http_api.schemas import (
    adapters,
    batch,
    chat,
    completion,
    fine_tuning,
    reading,
    response,
    sampling,
    tokens,
)
from redmux_server.http_api.schemas.body import Body

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "http.md").read_text()


def test_every_field_is_in_the_document():
    for model in (completion.CompletionBody, chat.ChatBody, response.ResponseBody):
        for name in sorted(model.no_effect):
            assert f"`{name}`" in DOCUMENT, name
    for model in (completion.CompletionBody, chat.ChatBody):
        for name in sorted(set(model.model_fields) - {"prompt", "messages", "model"}):
            assert f"`{name}`" in DOCUMENT, name


# The rows of its table, by what their first column begins with.
ROWS = {
    "/v1/completions": (completion.CompletionBody,),
    "/v1/chat/completions": (chat.ChatBody,),
    "/v1/responses": (response.ResponseBody,),
    "/v1/embeddings": (
        reading.EmbeddingBody, reading.PoolingBody, reading.ClassifyBody, reading.ScoreBody,
    ),
    "/tokenize": (tokens.TokenizeBody,),
    "/v1/load_lora_adapter": (adapters.LoadBody,),
    "/v1/unload_lora_adapter": (adapters.UnloadBody,),
    "/v1/fine_tuning/jobs": (fine_tuning.JobBody,),
    "method": (fine_tuning.Method,),
    "/v1/batches": (batch.BatchBody,),
    "stream_options": (sampling.StreamOptions,),
    "structured_outputs": (sampling.StructuredOutputs,),
    "json_schema": (sampling.JsonSchema, response.TextFormat),
    "text": (response.TextOptions,),
}  # fmt: skip
BASES = {"SamplingBody", "ReadingBody", "InputBody"}  # of others, sent nowhere


def columns(row):
    """Returns of a row the first name, the fields without effect, and those that are refused."""
    what, effect, refused = row.strip("| ").split(" | ")
    found = re.findall(r"`(\w+)`(?: \(([^)]*)\))?", refused)
    values = {name: [json.loads(v) for v in re.findall("`(.*?)`", told)] for name, told in found}
    return re.findall("`(.+?)`", what)[0], set(re.findall(r"`(\w+)`", effect)), values


def test_fields_without_effect_and_refused_ones_are_those_of_the_code():
    part = DOCUMENT.split("### Fields without effect, and fields that are refused\n")[1]
    table = re.findall(r"^\|.*\|$", part.split("\n## ")[0], re.MULTILINE)[2:]
    told = {name: rest for name, *rest in map(columns, table)}
    assert set(told) == set(ROWS)
    for name, classes in ROWS.items():
        effect, refused = told[name]
        for cls in classes:
            assert effect == set(cls.no_effect), (name, cls)
            assert set(refused) == set(cls.unserved), (name, cls)
            for field, values in refused.items():
                asks_for_nothing = cls.unserved[field][0]
                assert all(value in values for value in asks_for_nothing), field
                assert all(value in asks_for_nothing for value in values), field
    listed = {cls for classes in ROWS.values() for cls in classes}
    left = {cls for cls in bodies() if cls.no_effect or cls.unserved} - listed
    assert {cls.__name__ for cls in left} == BASES


def bodies():
    left, found = [Body], set()
    while left:
        below = left.pop().__subclasses__()
        found.update(below)
        left += below
    return found


def test_limits_of_time_and_size_are_those_of_the_code():
    part = DOCUMENT.split("## Headers and limits\n")[1].split("\n## ")[0]
    limits = Limits(connections=0)
    for told in (
        f"A head has at most {limits.head_bytes >> 10} KiB, within {limits.head_s:g} s",
        f"who reads nothing for {limits.stall_s:g} s",
        f"the rest of a body {limits.rest_s:g} s after its answer",
        f"no request for {limits.idle_s:g} s",
        f"A body has at most {gate._BODY_BYTES >> 20} MiB",
        f"within {gate._RECEIVE_S:g} s, and is called",
        f"Beyond {_MAX_CONNECTIONS:,} connections",
    ):
        assert told in part


CHAT = [{"role": "user", "content": "hi"}]
ASKED = [
    ("POST", "/v1/completions", {"prompt": "ab", "max_tokens": 2}),
    ("POST", "/v1/completions", {
        "prompt": [[66, 67], [68]], "max_tokens": 2, "logprobs": 2, "prompt_logprobs": 1,
        "return_token_ids": True, "echo": True, "n": 2, "temperature": 1,
    }),
    ("POST", "/v1/chat/completions", {"messages": CHAT, "max_tokens": 2}),
    ("POST", "/v1/chat/completions", {
        "messages": CHAT, "max_tokens": 2, "logprobs": True, "top_logprobs": 2,
        "return_token_ids": True, "stop_token_ids": [*range(1, 200)], "model": "pirate",
    }),
    ("POST", "/v1/responses", {"input": "hi", "max_output_tokens": 2, "instructions": "x"}),
    ("POST", "/v1/responses", {
        "input": CHAT, "text": {"format": {"type": "json_schema", "name": "x", "schema": {
            "enum": ["a"]}}}, "include": ["message.output_text.logprobs"], "top_logprobs": 1,
    }),
    ("POST", "/v1/embeddings", {"input": ["a", "b"]}),
    ("POST", "/v1/embeddings", {"input": "a", "encoding_format": "base64", "model": "pirate"}),
    ("POST", "/pooling", {"input": "a"}),
    ("POST", "/score", {"text_1": "a", "text_2": ["b", "c"]}),
    ("POST", "/tokenize", {"prompt": "a", "return_token_strs": True}),
    ("POST", "/tokenize", {"messages": CHAT, "model": "pirate"}),
    ("POST", "/detokenize", {"tokens": [66]}),
    ("GET", "/v1/models", None),
    ("GET", "/v1/models/pirate", None),
    ("GET", "/v1/adapters", None),
    ("GET", "/v1/adapters/pirate", None),
    ("GET", "/version", None),
    ("GET", "/health", None),
    ("GET", "/ready", None),
    ("POST", "/classify", {"input": "a"}),
    ("POST", "/v1/completions", {"prompt": "a", "suffix": "b"}),
    ("GET", "/v1/models/nobody", None),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path", "body"), ASKED)
async def test_answers_are_what_the_document_of_the_door_says(
    http, put, base, fits, method, path, body
):
    await put("pirate", base.adapter(1), replace=True)
    document = (await http.get("/openapi.json")).json()
    if body is None:
        response = await http.get(path)
    else:
        body = {"model": "tiny", **body}
        response = await http.post(path, json=body)
        asked = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        known = jsonschema.Draft202012Validator(
            {**asked["schema"], "components": document["components"]}
        )
        assert known.is_valid(body) == ("suffix" not in body)  # which is not served
    name = "{name}" if "adapters" in path else "{model}"
    operations = document["paths"][re.sub("(pirate|nobody)$", name, path)]
    fits(document, operations[method.lower()], response)


async def test_of_adapters_put_and_deleted_the_document_tells_as_well(http, base, fits):
    document = (await http.get("/openapi.json")).json()
    operations = document["paths"]["/v1/adapters/{name}"]
    header = {"content-type": "application/octet-stream"}
    for _ in range(2):
        response = await http.put(
            "/v1/adapters/told", content=to_bytes(base.adapter(5)), headers=header
        )
        fits(document, operations["put"], response)
    for _ in range(2):
        fits(document, operations["delete"], await http.delete("/v1/adapters/told"))


async def test_the_document_says_what_every_success_is(http):
    for path, operations in (await http.get("/openapi.json")).json()["paths"].items():
        for method, operation in operations.items():
            (success,) = {status for status in operation["responses"] if status == "200"}
            for kind, content in operation["responses"][success]["content"].items():
                assert content["schema"], (method, path, kind)


async def test_of_what_is_kept_for_callers_the_document_tells_as_well(http, fits):
    paths = (document := (await http.get("/openapi.json")).json())["paths"]

    async def asked(method, path, operation=None, **options):
        response = await http.request(method, path, **options)
        fits(document, paths[operation or path][method.lower()], response)
        return response.json()

    async def sent(purpose, data):
        form = {"files": {"file": ("a.jsonl", data)}, "data": {"purpose": purpose}}
        return (await asked("POST", "/v1/files", **form))["id"]

    async def ended(path, operation):
        while (found := await asked("GET", path, operation))["status"] in (
            "validating_files", "queued", "validating", "in_progress", "finalizing",
        ):  # fmt: skip
            await asyncio.sleep(0.01)
        return found

    file = await sent("fine-tune", b"{}\n")
    await asked("GET", f"/v1/files/{file}", "/v1/files/{file_id}")
    content = await http.get(f"/v1/files/{file}/content")
    told = paths["/v1/files/{file_id}/content"]["get"]["responses"]["200"]["content"]
    assert list(told) == [content.headers["content-type"]]

    one = "/v1/fine_tuning/jobs/{job_id}"
    body = {"model": "tiny", "training_file": file, "metadata": {"a": "b"}}
    path = f"/v1/fine_tuning/jobs/{(await asked('POST', '/v1/fine_tuning/jobs', json=body))['id']}"
    assert (await ended(path, one))["status"] == "failed"
    await asked("GET", f"{path}/events", f"{one}/events")
    await asked("GET", f"{path}/checkpoints", f"{one}/checkpoints")
    await asked("POST", f"{path}/cancel", f"{one}/cancel")
    await asked("GET", "/v1/fine_tuning/jobs")

    asks = {"custom_id": "a", "method": "POST", "url": "/v1/embeddings",
            "body": {"model": "tiny", "input": "a"}}  # fmt: skip
    for data in (json.dumps(asks).encode(), b"{}\n"):
        file = await sent("batch", data)
        body = {"input_file_id": file, "endpoint": "/v1/embeddings", "completion_window": "1h"}
        path = f"/v1/batches/{(await asked('POST', '/v1/batches', json=body))['id']}"
        await ended(path, "/v1/batches/{batch_id}")
        await asked("POST", f"{path}/cancel", "/v1/batches/{batch_id}/cancel")
    await asked("GET", "/v1/batches")
    await asked("GET", "/v1/status")
    await asked("GET", "/v1/files")
    await asked("DELETE", f"/v1/files/{file}", "/v1/files/{file_id}")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/side_by_side", {"path": "/v1/completions", "models": ["tiny"], "request": {}}),
        ("/v1/completions", {"model": "tiny", "prompt": "a", "max_tokens": 1, "stream": True}),
        ("/v1/responses", {"model": "tiny", "input": "a", "max_output_tokens": 1, "stream": True}),
    ],
)
async def test_events_of_streams_are_what_the_document_says(http, path, body):
    response = await http.post(path, json=body)
    kind = response.headers["content-type"].partition(";")[0]
    document = (await http.get("/openapi.json")).json()
    told = document["paths"][path]["post"]["responses"]["200"]["content"][kind]["schema"]
    assert (
        "application/json" in document["paths"][path]["post"]["responses"]["200"]["content"]
    ) == (path != "/v1/side_by_side")
    for event in response.text.removesuffix("\n\n").split("\n\n"):
        jsonschema.validate(dict(line.split(": ", 1) for line in event.split("\n")), told)
