"""Whatever comes in, nothing is answered by an error of the server's own."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

BODIES = {
    "/v1/completions": {"prompt": "a", "max_tokens": 1},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
    "/v1/responses": {"input": "a", "max_output_tokens": 1},
    "/v1/embeddings": {"input": "a"},
    "/pooling": {"input": "a"},
    "/classify": {"input": "a"},
    "/score": {"text_1": "a", "text_2": "b"},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [1]},
    "/v1/load_lora_adapter": {"lora_name": "x", "lora_path": "x"},
    "/unload_lora_adapter": {"lora_name": "x"},
}
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text()
    | st.sampled_from(["\ud800", "a" * 3000, 1 << 64, -1, 1e308]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


@pytest.fixture(scope="module")
def fields(server):
    """The fields of the body of every path, as the document tells them."""
    from redmux_server.http_api.schemas import adapters, chat, completion, reading, response, tokens

    models = {
        "/v1/completions": completion.CompletionBody,
        "/v1/chat/completions": chat.ChatBody,
        "/v1/responses": response.ResponseBody,
        "/v1/embeddings": reading.EmbeddingBody,
        "/pooling": reading.PoolingBody,
        "/classify": reading.ClassifyBody,
        "/score": reading.ScoreBody,
        "/tokenize": tokens.TokenizeBody,
        "/detokenize": tokens.DetokenizeBody,
        "/v1/load_lora_adapter": adapters.LoadBody,
        "/unload_lora_adapter": adapters.UnloadBody,
    }
    return {
        path: sorted({*model.model_fields, *model.no_effect, *model.unserved} - {"model"})
        for path, model in models.items()
    }


@pytest.mark.parametrize("path", BODIES)
async def test_no_value_of_any_field_is_an_error_of_the_servers(http, fields, path):
    """A field at a time, and several at once."""

    @settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.dictionaries(st.sampled_from(fields[path]), VALUES, min_size=1, max_size=3))
    def collect(changed):
        cases.append(changed)

    cases = []
    collect()
    for changed in cases:
        named = {} if "lora" in path else {"model": "tiny"}
        body = json.dumps({**BODIES[path], **named, **changed}, ensure_ascii=True)
        response = await http.post(
            path, content=body.encode(), headers={"content-type": "application/json"}
        )
        assert response.status_code < 500, (changed, response.text)
        if response.status_code >= 400:
            error = response.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"null", b"[]", b'"a"', b"\xff", b"NaN", b"{}" * 2, b'{"a": 1e999}',
        b"[" * 100_000, b'{"a":' * 100_000, b'{"model": "\\ud800", "prompt": "a"}',
        b'{"model": "tiny", "prompt": "\\ud800"}', b"9" * 100_000,
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/embeddings"])
async def test_what_is_no_json_object_is_told_so(http, path, content):
    response = await http.post(path, content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["message"]


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "json"]
)
async def test_a_body_that_is_called_something_else_is_refused(http, kind):
    """A page of another origin may send these without asking first."""
    response = await http.post(
        "/v1/completions", content=b'{"model": "tiny", "prompt": "a"}',
        headers={"content-type": kind},
    )  # fmt: skip
    assert response.status_code == 415
    assert "application/json" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("POST", "/", 405), ("GET", "/v1", 404), ("POST", "/v1/models", 405),
        ("GET", "/v1/completions", 405), ("PATCH", "/v1/models/x", 405),
        ("PATCH", "/v1/adapters/x", 405), ("GET", "/v1/moderations", 404),
        ("GET", "/v1/models/" + "x" * 9000, 404), ("GET", "/v1/models/%00", 404),
        ("GET", "/v1/models/%ff%fe", 404), ("GET", "/%2e%2e/%2e%2e/etc/passwd", 404),
        ("OPTIONS", "/v1/models", 405), ("BREW", "/v1/models", 400),
    ],
)  # fmt: skip
async def test_paths_and_methods_that_are_not_there_have_openais_errors(http, method, path, status):
    response = await http.request(method, path)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


async def test_a_method_that_is_not_there_is_told_all_that_are(http):
    for path, allowed in (("/v1/adapters/x", "DELETE, GET, PUT"), ("/v1/completions", "POST")):
        response = await http.patch(path)
        assert response.status_code == 405
        assert response.headers["allow"] == allowed


async def test_a_prompt_that_is_too_long_is_told_as_clients_look_for_it(http, model):
    """LangChain goes by the code, litellm by the words."""
    for path, field in (
        ("/v1/completions", {"prompt": "a" * 300}),
        ("/v1/completions", {"prompt": "a" * 99_999}),
        ("/v1/completions", {"prompt": [66] * 300}),
        ("/v1/completions", {"prompt": "a", "max_tokens": 300}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a" * 300}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a" * 99_999}]}),
        ("/v1/embeddings", {"input": "a" * 300}),
        ("/v1/embeddings", {"input": "a" * 99_999}),
        ("/v1/embeddings", {"input": [66] * 300}),
    ):
        response = await http.post(path, json={"model": model, **field})
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert error["code"] == "context_length_exceeded", field
        assert error["message"].startswith("This model's maximum context length is 256 tokens: ")


@pytest.mark.parametrize("value", [0, 0.0, "", []])
async def test_only_the_very_value_that_asks_for_nothing_is_taken(http, model, value):
    """In Python 0 is False."""
    body = {"model": model, "prompt": "a", "max_tokens": 1, "use_beam_search": value}
    response = await http.post("/v1/completions", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "use_beam_search"
