"""What the page at / asks for: its files, the status, and streams side by side."""

import asyncio
import contextlib
import json

import pytest
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from redmux_server.http_api import side_by_side
from redmux_server.http_api.errors import DONE
from redmux_server.http_api.gate import Caller
from redmux_server.http_api.sse import EventStream
from redmux_server.load import load_message

BODY = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 12, "logprobs": True}


def asking(*models, path="/v1/chat/completions", **more):
    return {"path": path, "models": list(models), "request": {**BODY, **more}}


def events(text):
    """Returns the data of all events by their names."""
    found = {}
    for event in text.removesuffix("\n\n").split("\n\n"):
        name, data = event.split("\n")
        found.setdefault(int(name.removeprefix("event: ")), []).append(data.removeprefix("data: "))
    return found


def said(data):
    """Returns the text and the tokens of a chat's events, however they were cut into events."""
    choices = [json.loads(item)["choices"][0] for item in data if item != "[DONE]"]
    text = "".join(choice["delta"].get("content", "") for choice in choices)
    return text, [t for c in choices if c["logprobs"] for t in c["logprobs"]["content"]]


async def until(condition):
    while not condition():
        await asyncio.sleep(0.001)


@pytest.mark.parametrize(
    ("path", "kind"),
    [("/", "text/html"), ("/page/page.js", "text/javascript"), ("/page/style.css", "text/css"),
     ("/page/icon.svg", "image/svg+xml")],
)  # fmt: skip
async def test_files_of_the_page_let_nothing_in_from_elsewhere(http, path, kind):
    response = await http.get(path)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith(kind)
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "*" not in policy
    assert "http" not in policy
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["cache-control"] == "no-cache"
    tag = response.headers["etag"]
    again = await http.get(path, headers={"if-none-match": tag})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["content-security-policy"] == policy
    other = await http.get(path, headers={"if-none-match": '"other"'})
    assert other.content == response.content
    head = await http.head(path)
    assert (head.status_code, head.content) == (200, b"")


@pytest.mark.parametrize("name", ["nothing.js", "..%2fapp.py", "%2e%2e", "page.js%00"])
async def test_the_page_has_no_other_files(http, name):
    assert (await http.get(f"/page/{name}")).status_code == 404


async def test_the_page_needs_no_key_and_what_it_asks_for_does(start_server):
    import httpx2

    server = await start_server(api_keys=("a-key-of-this-test",))
    async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{server.http_port}") as http:
        assert (await http.get("/")).status_code == 200
        assert (await http.get("/page/page.js")).status_code == 200
        for method, path in (
            ("GET", "/v1/status"), ("POST", "/v1/side_by_side"),
            ("DELETE", "/v1/side_by_side/x/0"), ("POST", "/"), ("PUT", "/page/page.js"),
        ):  # fmt: skip
            assert (await http.request(method, path)).status_code == 401


async def test_the_status_counts_rows_without_naming_whose_they_are(http, api, server, put, base):
    for seed in (1, 2):
        await put(f"counted-{seed}", base.adapter(seed))
    before = (await http.get("/v1/status")).json()
    assert before["generates"] is True
    assert (before["running"], before["waiting"], before["max_running"]) == (0, 0, 16)
    models = ["tiny", "counted-1", "counted-1", "counted-2"]
    body = {"prompt": "a", "max_tokens": 200, "ignore_eos": True}
    tasks = [asyncio.create_task(http.post("/v1/completions", json={**body, "model": m}))
             for m in models]  # fmt: skip
    await until(lambda: server.engine.num_running == 4)
    response = await http.get("/v1/status")
    status = response.json()
    assert (status["base_rows"], status["adapter_rows"]) == (1, [2, 1])
    assert status["running"] == 4
    assert 0 < status["kv_cache_used"] <= 1
    assert "counted" not in response.text
    await asyncio.gather(*tasks)
    after = (await http.get("/v1/status")).json()
    assert after["decode_tokens"] - before["decode_tokens"] == 4 * 199
    assert after["prefill_tokens"] > before["prefill_tokens"]


async def test_streams_side_by_side_are_those_of_each_model_alone(http, api, put, base):
    for seed in (3, 4):
        await put(f"side-{seed}", base.adapter(seed))
    models = ["tiny", "side-3", "side-4", "nowhere", "side-3"]
    response = await http.post("/v1/side_by_side", json=asking(*models))
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    found = events(response.text)
    assert set(found) == set(range(5))
    for index, model in enumerate(models):
        assert found[index][-1] == "[DONE]"
        if model == "nowhere":
            alone = await http.post("/v1/chat/completions", json={**BODY, "model": model})
            assert json.loads(found[index][0]) == alone.json()
            assert len(found[index]) == 2
            continue
        alone = await http.post(
            "/v1/chat/completions", json={**BODY, "model": model, "stream": True}
        )
        own = [line.removeprefix("data: ") for line in alone.text.split("\n\n")[:-1]]
        assert said(found[index]) == said(own)
        assert len(said(own)[1]) == 12


async def test_completions_stand_side_by_side_as_well(http, api):
    body = {"path": "/v1/completions", "models": ["tiny", "tiny"],
            "request": {"prompt": "a\n\ndata: b", "echo": True, "max_tokens": 3}}  # fmt: skip
    found = events((await http.post("/v1/side_by_side", json=body)).text)
    texts = ["".join(json.loads(d)["choices"][0]["text"] for d in data[:-1])
             for data in found.values()]  # fmt: skip
    assert texts[0] == texts[1]
    assert texts[0].startswith("a\n\ndata: b")


async def test_one_of_several_streams_is_stopped_by_the_id_of_the_request(http, server, steps):
    steps.allow(3)
    asked = asking("tiny", "tiny", max_tokens=150, ignore_eos=True)
    headers = {"x-request-id": "mine-1"}
    asked_once = http.stream("POST", "/v1/side_by_side", json=asked, headers=headers)
    async with asked_once as response:
        lines = response.aiter_text()
        text = await anext(lines)
        same = await http.post("/v1/side_by_side", json=asked, headers=headers)
        refused = json.loads(same.text.split("\n\n")[0].removeprefix("data: "))
        assert "mine-1" in refused["error"]["message"]
        assert (await http.delete("/v1/side_by_side/mine-1/2")).status_code == 404
        assert (await http.delete("/v1/side_by_side/mine-2/0")).status_code == 404
        stopped = await http.delete("/v1/side_by_side/mine-1/0")
        assert stopped.json() == {"id": "mine-1", "index": 0, "stopped": True}
        await until(lambda: len(steps.ended) == 1)
        steps.free()
        text += "".join([piece async for piece in lines])
    found = events(text)
    assert found[0][-1] == found[1][-1] == "[DONE]"
    assert '"finish_reason":"length"' in found[1][-2]
    assert '"finish_reason":"length"' not in found[0][-2]
    assert len(found[0]) < len(found[1])
    assert (await http.delete("/v1/side_by_side/mine-1/0")).status_code == 404
    await until(lambda: server.engine.num_open == 0)


async def test_stops_of_a_stream_whose_end_waits_for_its_reader_do_not_take_the_end_away():
    app = FastAPI()
    app.include_router(side_by_side.router())

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        async def pieces():
            if (await request.json())["model"] == "a":
                yield b'data: {"choices":[]}\n\n'
            yield DONE

        return EventStream(pieces(), {})

    async def ask(method, path, body, send):
        scope = {
            "type": "http", "method": method, "path": path, "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
            "caller": Caller("", "mine", {}),
        }  # fmt: skip

        async def receive():
            return {"type": "http.request", "body": json.dumps(body).encode()}

        await app(scope, receive, send)

    pieces, is_read = [], asyncio.Event()

    async def read(message):
        if message["type"] == "http.response.body":
            pieces.append(message["body"])
            await is_read.wait()

    body = {"path": "/v1/completions", "models": ["a", "b"], "request": {"prompt": "x"}}
    reading = asyncio.create_task(ask("POST", "/v1/side_by_side", body, read))
    await until(lambda: pieces)

    async def ignore(message):
        pass

    for _ in range(3):
        for _ in range(100):
            await asyncio.sleep(0)  # the streams get as far as they can
        for index in (0, 1):
            await ask("DELETE", f"/v1/side_by_side/mine/{index}", None, ignore)
    is_read.set()
    async with asyncio.timeout(30):
        await reading
    found = events(b"".join(pieces).decode())
    assert found[0][-1] == found[1][-1] == "[DONE]"


async def test_a_reader_who_leaves_stops_all_streams(http, server, steps):
    steps.allow(3)
    before = load_message(server.metrics).num_completion_tokens
    asked = asking(*["tiny"] * 5, max_tokens=200, ignore_eos=True)
    with contextlib.suppress(asyncio.CancelledError):
        async with http.stream("POST", "/v1/side_by_side", json=asked) as response:
            await anext(response.aiter_text())
            assert server.engine.num_open == 5
    await until(lambda: len(steps.ended) == 5)
    steps.free()
    await until(lambda: server.engine.num_open == 0)
    assert load_message(server.metrics).num_completion_tokens - before < 5 * 199


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"path": "/v1/models"}, 400, "path"),
        ({"models": []}, 400, "models"),
        ({"models": ["tiny"] * 257}, 400, "models"),
        ({"models": "tiny"}, 400, "models"),
        ({"request": []}, 400, "request"),
        ({"other": 1}, 400, "other"),
        ({"models": ["tiny"] * 200, "request": {"prompt": "x" * 30000}}, 413, "models"),
    ],
)
async def test_what_cannot_be_asked_side_by_side_is_refused_as_a_whole(
    http, server, change, status, param
):
    response = await http.post("/v1/side_by_side", json={**asking("tiny"), **change})
    assert response.status_code == status
    assert response.json()["error"]["param"] == param
