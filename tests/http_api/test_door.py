"""The port on sockets, before an application of our own: what a peer that behaves badly can do."""

import asyncio
import contextlib
import json

import pytest

from redmux.errors import NotFoundError, ResourceExhaustedError
from redmux_server.config import ServerConfig
from redmux_server.http_api.connection import Limits
from redmux_server.http_api.door import HttpDoor
from redmux_server.http_api.health import Health
from redmux_server.in_flight import CALL_BYTES, InFlight
from redmux_server.keys import ApiKeys
from redmux_server.metrics import Metrics
from redmux_server.metrics_port import Exposition, State

KEY = "Authorization: Bearer first-key\r\n"
MIB = 1 << 20


class Echo:
    """Answers with the body that came, or as its path asks."""

    def __init__(self):
        self.num_cancelled = 0
        self.is_open = asyncio.Event()

    async def __call__(self, scope, receive, send):
        path = scope["path"]
        message = await receive()
        if path == "/wait":
            try:
                self.is_open.set()
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.num_cancelled += 1
                raise
        if path == "/refuse":
            raise NotFoundError("there is none")
        if path == "/break":
            raise RuntimeError("a secret")
        body = message["body"]
        headers = [(b"x-tenant", scope["caller"].tenant.encode())]
        if path == "/large":
            body = b"x" * (16 * MIB)
        if path == "/stream":
            headers.append((b"content-type", b"text/event-stream"))
        else:
            headers.append((b"content-length", str(len(body)).encode()))
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        if path == "/stream":
            self.is_open.set()
            try:
                while True:
                    await send({"type": "http.response.body", "body": b"x" * 65536,
                                "more_body": True})  # fmt: skip
                    await asyncio.sleep(0)
            except asyncio.CancelledError:
                self.num_cancelled += 1
                raise
        await send({"type": "http.response.body", "body": body})


@contextlib.asynccontextmanager
async def opened(
    app="echo", *, keys=(), in_flight=None, limits=None, state=State.SERVING, **config
):
    config = ServerConfig(http_port=0, **config)
    health = Health(lambda: state, Exposition(Metrics().registry))
    door = HttpDoor(config, ApiKeys(keys), in_flight or InFlight(), health, Limits(**{
        "connections": 64, **(limits or {})}))  # fmt: skip
    door.number = door.bind()
    await door.open()
    door.app = Echo() if app == "echo" else None
    if door.app is not None:
        door.serve(door.app, {"/big": 8 * MIB})
    try:
        yield door
    finally:
        await door.close()


async def connect(door):
    return await asyncio.open_connection("127.0.0.1", door.number)


async def read_answer(reader):
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    first, *lines = head.rstrip().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return int(first.split(" ")[1]), headers, body


async def ask(door, path="/", headers="", body=b"", method="POST"):
    reader, writer = await connect(door)
    writer.write(
        f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n".encode()
        + f"{headers}\r\n".encode("latin-1")
        + body
    )
    try:
        return await read_answer(reader)
    finally:
        writer.close()


async def ended(reader):
    """Whether the other side ends the connection."""
    with contextlib.suppress(ConnectionError):
        while await reader.read(1 << 20):
            pass
    return True


async def until(condition):
    while not condition():
        await asyncio.sleep(0.001)


async def test_a_body_arrives_and_an_answer_comes_back_on_the_same_connection():
    async with opened() as door:
        reader, writer = await connect(door)
        for body in (b"one", b"two"):
            writer.write(b"POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\n" + body)
            status, headers, echoed = await read_answer(reader)
            assert (status, echoed) == (200, body)
            assert "date" in headers
            assert "server" not in headers
        writer.write(b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n")
        assert (await read_answer(reader))[2] == b"abc"
        writer.close()


@pytest.mark.parametrize(
    ("given", "kept"),
    [("abc-1", True), ("a" * 128, True), ("a" * 129, False), ("", False), ("a b", False),
     ("\xe4", False)],
)  # fmt: skip
async def test_a_request_keeps_its_id_if_that_is_one(given, kept):
    async with opened() as door:
        told = (await ask(door, headers=f"X-Request-Id: {given}\r\n"))[1]["x-request-id"]
        assert (told == given) == kept
        assert kept or told.startswith("req-")


async def test_while_the_model_loads_only_probes_are_answered():
    async with opened(app=None, state=State.LOADING) as door:
        status, headers, body = await ask(door, "/v1/completions")
        assert status == 503
        assert headers["retry-after"] == "1"
        assert headers["retry-after-ms"] == "1000"
        assert json.loads(body)["error"]["code"] == "unavailable"
        assert (await ask(door, "/health", method="GET"))[0] == 200
        status, _, body = await ask(door, "/ready", method="GET")
        assert (status, json.loads(body)) == (503, {"status": "loading"})
        assert (await ask(door, "/version", method="GET"))[0] == 200
        assert (await ask(door, "/metrics", method="GET"))[0] == 200


async def test_who_has_no_key_learns_nothing_and_sends_nothing():
    for app in ("echo", None):
        async with opened(app, keys=["first-key"]) as door:
            for header in ("", "Authorization: Bearer other\r\n", "Authorization: first-key\r\n"):
                status, headers, body = await ask(door, "/x", header)
                assert status == 401
                assert headers["www-authenticate"] == "bearer"
                assert json.loads(body)["error"]["code"] == "invalid_api_key"
            reader, writer = await connect(door)
            writer.write(b"POST /x HTTP/1.1\r\nContent-Length: 1000000\r\n\r\n")  # and nothing else
            assert (await read_answer(reader))[0] == 401
            writer.close()
    async with opened(keys=["first-key"]) as door:
        assert (await ask(door, "/x", KEY))[1]["x-tenant"].startswith("key-")
    async with opened() as door:
        assert (await ask(door, "/x", KEY))[1]["x-tenant"] == ""


async def test_bodies_have_the_limit_of_their_path():
    async with opened() as door:
        for path, size, status in (
            ("/", 4 * MIB, 200), ("/", 4 * MIB + 1, 413), ("/big", 8 * MIB, 200),
            ("/big/x", 8 * MIB + 1, 413), ("/health", 1, 413),
        ):  # fmt: skip
            reader, writer = await connect(door)
            writer.write(f"POST {path} HTTP/1.1\r\nContent-Length: {size}\r\n\r\n".encode())
            if status == 200:
                writer.write(b"x" * size)
            assert (await read_answer(reader))[0] == status, path
            writer.close()
        reader, writer = await connect(door)  # one that does not tell its length
        writer.write(b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")
        piece = b"10000\r\n" + b"x" * 65536 + b"\r\n"
        writer.write(piece * 65)
        status, _, body = await read_answer(reader)
        assert status == 413
        assert json.loads(body)["error"]["code"] == "request_too_large"
        writer.close()


async def test_what_is_left_of_a_refused_body_is_not_waited_for():
    async with opened(limits={"rest_s": 0.05}) as door:
        reader, writer = await connect(door)
        writer.write(b"POST / HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n")
        assert (await read_answer(reader))[0] == 413
        assert await ended(reader)
        writer.close()


@pytest.mark.parametrize(
    "text",
    [
        "nonsense\r\n\r\n",
        "GET / HTTP/3.7\r\n\r\n",
        "GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        "GET / HTTP/1.1\r\nContent-Length: x\r\n\r\n",
        "GET / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        "POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        "CONNECT x:1 HTTP/1.1\r\n\r\n",
        "GET /\xe4 HTTP/1.1\r\n\r\n",
        "\x16\x03\x01\x02\x00",
    ],
)
async def test_what_is_no_request_is_a_bad_one(text):
    async with opened() as door:
        reader, writer = await connect(door)
        writer.write(text.encode("latin-1"))
        status, _, body = await read_answer(reader)
        assert 400 <= status < 500
        assert json.loads(body)["error"]["message"]
        writer.close()


@pytest.mark.parametrize(
    "head",
    [
        b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nA: " + b"a" * 40_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 20_000 + b"\r\n",
        b"GET / HTTP/1.1\r\nA: " + b"a" * 400_000,
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n" + b"a: b\r\n" * 20_000,
    ],
)
async def test_a_head_that_is_too_large_is_refused(head):
    async with opened() as door:
        reader, writer = await connect(door)
        writer.write(head)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            assert (await read_answer(reader))[0] in (431, 400)
        assert await ended(reader)
        writer.close()


@pytest.mark.parametrize(
    "begin", [b"", b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nHost: x\r\n\r\nG"]
)
async def test_a_head_that_does_not_come_ends_its_connection(begin):
    async with opened(limits={"head_s": 0.05}) as door:
        reader, writer = await connect(door)
        writer.write(begin)
        assert await ended(reader)
        writer.close()


async def test_an_idle_connection_ends_by_itself():
    async with opened(limits={"idle_s": 1}) as door:
        reader, writer = await connect(door)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        await read_answer(reader)
        assert await ended(reader)
        writer.close()


async def test_a_body_that_does_not_come_is_not_waited_for():
    async with opened() as door:
        door._gate._receive_s = 0.05
        reader, writer = await connect(door)
        writer.write(b"POST / HTTP/1.1\r\nContent-Length: 10\r\n\r\nabc")
        status, headers, body = await read_answer(reader)
        assert status == 504
        assert headers["x-should-retry"] == "false"
        assert "did not arrive" in json.loads(body)["error"]["message"]
        writer.close()


@pytest.mark.parametrize("path", ["/stream", "/large"])
async def test_who_does_not_read_loses_the_connection(path):
    in_flight = InFlight()
    async with opened(in_flight=in_flight, limits={"stall_s": 0.1}) as door:
        _, writer = await connect(door)
        writer.transport.pause_reading()
        writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        await until(lambda: door._state.connections)
        await until(lambda: in_flight.num_bytes)
        await until(lambda: not door._state.connections)
        await until(lambda: not in_flight.num_bytes)
        writer.close()


async def test_what_a_caller_holds_is_bounded_over_all_its_connections():
    in_flight = InFlight(share_bytes=3 * CALL_BYTES, total_bytes=100 * CALL_BYTES)
    async with opened(keys=["first-key", "other-key"], in_flight=in_flight) as door:
        in_flight.share_bytes = 3 * CALL_BYTES  # `serve` has made room for large ones
        open_ones = []
        for _ in range(3):
            _, writer = await connect(door)
            writer.write(f"GET /wait HTTP/1.1\r\n{KEY}\r\n".encode())
            open_ones.append(writer)
        await until(lambda: in_flight.num_bytes == 3 * CALL_BYTES)
        status, headers, body = await ask(door, "/", KEY)
        assert status == 429
        assert headers["retry-after-ms"] == "1000"
        assert json.loads(body)["error"]["type"] == "rate_limit_error"
        in_flight.total_bytes = 0
        assert (await ask(door, "/health", method="GET"))[0] == 200
        in_flight.total_bytes = 100 * CALL_BYTES
        other = KEY.replace("first", "other")
        assert (await ask(door, "/", other))[0] == 200
        assert (await ask(door, "/health", method="GET"))[0] == 200
        for writer in open_ones:
            writer.close()
        await until(lambda: in_flight.num_bytes == 0)


async def test_a_body_is_counted_before_it_comes_and_while_it_does():
    in_flight = InFlight()
    async with opened(in_flight=in_flight) as door:
        in_flight.share_bytes = MIB
        reader, writer = await connect(door)
        writer.write(f"POST / HTTP/1.1\r\nContent-Length: {2 * MIB}\r\n\r\n".encode())
        assert (await read_answer(reader))[0] == 429
        writer.close()
        reader, writer = await connect(door)
        writer.write(b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")
        writer.write((b"10000\r\n" + b"x" * 65536 + b"\r\n") * 20)
        assert (await read_answer(reader))[0] == 429
        writer.close()
        await until(lambda: in_flight.num_bytes == 0)


async def test_an_answer_that_is_too_large_for_its_caller_becomes_an_error():
    in_flight = InFlight()
    async with opened(in_flight=in_flight) as door:
        in_flight.share_bytes = MIB
        status, _, body = await ask(door, "/large")
        assert status == 429
        assert "replies that you have not read" in json.loads(body)["error"]["message"]


async def test_who_goes_away_ends_what_it_started():
    async with opened() as door:
        for path in ("/wait", "/stream"):
            door.app.is_open.clear()
            _, writer = await connect(door)
            writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            await door.app.is_open.wait()
            before = door.app.num_cancelled
            writer.transport.abort()
            await until(lambda before=before: door.app.num_cancelled > before)


async def test_connections_are_bounded_and_idle_ones_make_way():
    async with opened(limits={"connections": 4}) as door:
        idle = [await connect(door) for _ in range(8)]
        assert (await ask(door))[0] == 200
        assert len(door._state.connections) <= 4
        busy = []
        for _ in range(4):
            reader, writer = await connect(door)
            writer.write(b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n")
            busy.append(writer)
            await until(lambda: len(door._state.tasks) == len(busy))
        reader, late = await connect(door)
        assert await ended(reader)
        assert len(door._state.tasks) == 4
        for writer in (*busy, late, *(writer for _, writer in idle)):
            writer.close()


async def test_errors_of_handlers_are_told_but_not_those_of_our_own(caplog):
    async with opened() as door:
        status, _, body = await ask(door, "/refuse")
        assert (status, json.loads(body)["error"]["code"]) == (404, "not_found")
        status, _, body = await ask(door, "/break")
        assert status == 500
        assert b"secret" not in body
        assert json.loads(body)["error"]["message"].split()[-1] in caplog.text
        assert "a secret" in caplog.text


async def test_a_door_that_closes_tells_those_who_wait():
    async with opened() as door:
        readers = []
        for path in ("/wait", "/stream"):
            door.app.is_open.clear()
            reader, writer = await connect(door)
            writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            await door.app.is_open.wait()
            readers.append((reader, writer))
        closing = asyncio.create_task(door.close())
        status, headers, body = await read_answer(readers[0][0])
        assert status == 503
        assert json.loads(body)["error"]["message"] == "the server is shutting down"
        assert headers["retry-after"] == "1"
        text = await readers[1][0].read()
        while piece := await readers[1][0].read(1 << 20):
            text = (text + piece)[-1000:]
        assert b'data: {"error":{"message":"the server is shutting down"' in text
        await closing
        for _, writer in readers:
            writer.close()


async def test_pages_of_other_origins_are_let_in_only_if_that_is_set():
    page = "Origin: https://a.example\r\n"
    asks = page + "Access-Control-Request-Method: POST\r\n"
    async with opened() as door:
        assert "access-control-allow-origin" not in (await ask(door, "/", page))[1]
    async with opened(http_cors_origin=("https://a.example",), keys=["first-key"]) as door:
        status, headers, _ = await ask(door, "/x", asks, method="OPTIONS")
        assert status == 204
        assert headers["access-control-allow-origin"] == "https://a.example"
        assert "authorization" in headers["access-control-allow-headers"]
        status, headers, _ = await ask(door, "/x", page)  # a page may read why it failed
        assert status == 401
        assert headers["access-control-allow-origin"] == "https://a.example"
        other = page.replace("a.example", "b.example")
        assert "access-control-allow-origin" not in (await ask(door, "/x", other + KEY))[1]
    async with opened(http_cors_origin=("*",)) as door:
        assert (await ask(door, "/", page))[1]["access-control-allow-origin"] == "https://a.example"


async def test_tls_is_that_of_grpc(tmp_path):
    import ssl

    import trustme

    authority = trustme.CA()
    pair = authority.issue_cert("localhost")
    pair.private_key_pem.write_to_path(tmp_path / "key.pem")
    pair.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    files = {"tls_cert": str(tmp_path / "cert.pem"), "tls_key": str(tmp_path / "key.pem")}
    async with opened(**files) as door:
        context = ssl.create_default_context()
        authority.configure_trust(context)
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", door.number, ssl=context, server_hostname="localhost"
        )
        writer.write(b"POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc")
        assert (await read_answer(reader))[2] == b"abc"
        writer.close()
        await writer.wait_closed()


async def test_no_port_is_opened_where_none_is_wanted():
    config = ServerConfig(http_port=-1)
    health = Health(lambda: State.LOADING, Exposition(Metrics().registry))
    door = HttpDoor(config, ApiKeys(()), InFlight(), health)
    assert door.bind() == -1
    await door.open()
    await door.close()


async def test_what_has_no_more_share_is_told_by_the_tree_of_errors():
    from redmux_server.http_api.errors import body_of, headers_of

    for err, told in (
        (ResourceExhaustedError("full", retry_after_s=0.5), {b"retry-after": b"1",
                                                             b"retry-after-ms": b"500"}),
        (ResourceExhaustedError("the disk is full"), {b"x-should-retry": b"false"}),
    ):  # fmt: skip
        assert dict(headers_of(err)) == told
        assert body_of(err)["error"]["code"] == "rate_limit_exceeded"
