"""What docs/http.md promises; its code is run by tests/test_documents.py."""

import asyncio
import json
import re
from pathlib import Path

import jsonschema
import pytest

from redmux_adapters import to_bytes
from redmux_server.http_api.schemas import chat, completion, response

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "http.md").read_text()


def test_every_field_is_in_the_document():
    for model in (completion.CompletionBody, chat.ChatBody, response.ResponseBody):
        for name in sorted(model.no_effect):
            assert f"`{name}`" in DOCUMENT, name
    for model in (completion.CompletionBody, chat.ChatBody):
        for name in sorted(set(model.model_fields) - {"prompt", "messages", "model"}):
            assert f"`{name}`" in DOCUMENT, name


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
