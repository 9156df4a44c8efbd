"""Deadlines: the time that a client waits to read something, and the field `timeout`."""

import pytest

SOON = {"x-stainless-read-timeout": "0.000001"}
TURNS = [{"role": "user", "content": "hi"}]
GENERATING = {
    "/v1/completions": {"prompt": "abc", "max_tokens": 2, "ignore_eos": True},
    "/v1/chat/completions": {"messages": TURNS, "max_tokens": 2, "ignore_eos": True},
    "/v1/responses": {"input": "hi", "max_output_tokens": 2, "ignore_eos": True},
}
READING = {
    "/v1/embeddings": {"input": "a"},
    "/pooling": {"input": "a"},
    "/score": {"text_1": "a", "text_2": "b"},
    "/v1/score": {"text_1": "a", "text_2": "b"},
}
CLASSES = {
    "/classify": {"input": "a"},
    "/pooling": {"input": "a", "task": "classify"},
    "/score": {"text_1": "a", "text_2": "b"},
}


def is_late(response):
    assert response.status_code == 504, response.text
    assert response.json()["error"]["code"] == "deadline_exceeded"
    assert response.headers["x-should-retry"] == "false"


async def held(http, path, body):
    """Asks with a deadline of the client's, with one of the request's, and with no fit one."""
    is_late(await http.post(path, json=body, headers=SOON))
    is_late(await http.post(path, json={**body, "timeout": 1e-6}))
    longer = await http.post(path, json={**body, "timeout": 60}, headers=SOON)
    assert longer.status_code == 200, longer.text  # what the request says goes before
    for header in ("nan", "-1", "soon", "inf"):
        response = await http.post(path, json=body, headers={"x-stainless-read-timeout": header})
        assert response.status_code == 200, response.text


@pytest.mark.parametrize("path", GENERATING)
async def test_a_whole_answer_has_the_deadline_of_its_client(http, model, path):
    await held(http, path, {"model": model, **GENERATING[path]})


@pytest.mark.parametrize("path", GENERATING)
async def test_a_stream_has_that_of_its_request_alone(http, model, path):
    body = {"model": model, **GENERATING[path], "stream": True}
    response = await http.post(path, json=body, headers=SOON)
    assert response.status_code == 200
    assert "deadline_exceeded" not in response.text
    late = await http.post(path, json={**body, "timeout": 1e-6})
    assert "deadline_exceeded" in late.text


@pytest.mark.parametrize("path", READING)
async def test_what_is_read_has_the_deadline_of_its_client(http, model, path):
    await held(http, path, {"model": model, **READING[path]})


@pytest.mark.parametrize("path", CLASSES)
async def test_classes_have_the_deadline_of_their_client(reading, path):
    await held(reading, path, {"model": "mood", **CLASSES[path]})


async def test_every_route_that_generates_or_reads_is_here(http):
    paths = (await http.get("/openapi.json")).json()["paths"]
    asked = {
        path for path, operations in paths.items()
        if {"generation", "reading"} & set(operations.get("post", {}).get("tags", ()))
    }  # fmt: skip
    assert asked - {"/v1/side_by_side"} == {*GENERATING, *READING, *CLASSES}  # that streams those
