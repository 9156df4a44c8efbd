"""What docs/http.md promises; its code is run by tests/test_documents.py."""

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
