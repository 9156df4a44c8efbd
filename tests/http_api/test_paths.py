"""Paths that are not there, and parameters of queries: neither is passed over in silence."""

import pytest

from redmux_server.http_api.validated import NO_EFFECT

OPEN = {"/health", "/ready", "/version", "/metrics", "/", "/page/{name}", "/docs"}


@pytest.mark.parametrize(
    ("method", "path", "told"),
    [
        ("POST", "/load_lora_adapter_from_tensors", "PUT the bytes of a safetensors file to "
         "/v1/adapters/{name}, or load one of the server's by POST /load_lora_adapter"),
        ("POST", "/chat/completions", "did you mean /v1/chat/completions"),
        ("POST", "/v1/v1/completions", "/v1/completions"),
        ("POST", "/v1/complete", "did you mean /v1/completions"),
        ("GET", "/v1/adapter", "did you mean /v1/adapters"),
        ("POST", "/rerank", "use POST /score"),
        ("POST", "/v1/messages", "use POST /v1/chat/completions"),
        ("GET", "/zzz", "there is no /zzz; see /docs"),
        ("GET", "/" + "x" * 9000, "x; see /docs"),
    ],
)  # fmt: skip
async def test_who_misses_a_path_is_told_what_is_there(http, method, path, told):
    response = await http.request(method, path)
    assert response.status_code == 404
    error = response.json()["error"]
    assert told in error["message"]
    assert len(error["message"]) < 500
    assert (error["type"], error["code"]) == ("invalid_request_error", "not_found")


async def test_what_is_named_instead_is_there(http):
    from redmux_server.http_api.missing import _INSTEAD

    paths = (await http.get("/openapi.json")).json()["paths"]
    for told in _INSTEAD.values():
        named = [word.strip(",;") for word in told.split() if word.startswith("/")]
        assert named
        assert set(named) <= set(paths)


@pytest.mark.parametrize("name", ["stream", "limit[x]", "a" * 500, "metadata[x"])
async def test_no_route_takes_a_parameter_that_it_has_not(http, name):
    paths = (await http.get("/openapi.json")).json()["paths"]
    num = 0
    for path, operations in paths.items():
        if path in OPEN:
            continue
        for method, operation in operations.items():
            known = {p["name"] for p in operation.get("parameters", ()) if p["in"] == "query"}
            content = b"{" if "requestBody" in operation else None
            response = await http.request(
                method, path, params={name: "1"}, content=content,
                headers={"content-type": "application/json"} if content else {},
            )  # fmt: skip
            assert response.status_code == 400, (method, path, response.text)
            error = response.json()["error"]
            assert error["param"] == name[:80]
            assert error["message"].startswith(f"{name[:80]} is no parameter of a query here; ")
            assert all(one in error["message"] for one in known)
            num += 1
    assert num > 30


async def test_what_clients_send_to_every_path_is_taken_and_listed(http, model):
    for name in NO_EFFECT:
        body = {"model": model, "prompt": "a", "max_tokens": 1}
        assert (await http.post(f"/v1/completions?{name}=2024-10-21", json=body)).is_success
        assert (await http.get(f"/v1/models?{name}=2024-10-21")).is_success


async def test_parameters_that_are_there_work_as_before(http):
    for query in ("metadata[a]=b&metadata[c]=d", "after=", "limit=3"):
        assert (await http.get(f"/v1/fine_tuning/jobs?{query}")).is_success, query
    assert (await http.get("/v1/files?purpose=batch&order=asc")).is_success
    refused = await http.get("/v1/batches?metadata[a]=b")
    assert refused.status_code == 400
    assert "those of this path are after, limit" in refused.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/health", "/ready", "/version", "/metrics", "/", "/docs"])
async def test_what_needs_no_key_takes_any_query(http, path):
    """Probes and browsers add their own, and a probe that is refused ends a server."""
    assert (await http.get(f"{path}?time=1")).is_success
