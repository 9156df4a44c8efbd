"""The metrics port on a socket: its paths, its states, and what it lets a peer hold."""

import asyncio
import contextlib

import pytest
from prometheus_client import CollectorRegistry, Counter

from redmux.errors import FailedPreconditionError
from redmux_server.metrics_port import MAX_CONNECTIONS, Exposition, MetricsPort, State


@contextlib.asynccontextmanager
async def opened(state=State.SERVING, registry=None, fresh_s=1, **options):
    exposition = Exposition(registry or CollectorRegistry(), fresh_s)
    port = MetricsPort(exposition, state if callable(state) else lambda: state, **options)
    await port.open("127.0.0.1", 0)
    try:
        yield port
    finally:
        await port.close()


async def ask(port, text):
    reader, writer = await asyncio.open_connection("127.0.0.1", port.port)
    writer.write(text.encode())
    answer = (await reader.read()).decode()
    writer.close()
    await writer.wait_closed()
    head, _, body = answer.partition("\r\n\r\n")
    return head, body


async def get(port, path, method="GET"):
    head, body = await ask(port, f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n")
    return int(head.split(" ")[1]), body


@pytest.mark.parametrize(
    ("state", "health", "readiness"),
    [
        (State.LOADING, 200, 503),
        (State.SERVING, 200, 200),
        (State.STUCK, 200, 503),
        (State.DRAINING, 200, 503),
        (State.DEAD, 503, 503),
    ],
)
async def test_health_and_readiness_are_those_of_the_state(state, health, readiness):
    async with opened(state) as port:
        assert await get(port, "/healthz") == (health, f"{state.value}\n")
        assert await get(port, "/readyz?verbose") == (readiness, f"{state.value}\n")


async def test_the_state_is_asked_anew_at_every_request():
    states = [State.LOADING, State.SERVING]
    async with opened(lambda: states.pop(0)) as port:
        assert [(await get(port, "/readyz"))[0] for _ in range(2)] == [503, 200]


@pytest.mark.parametrize("path", ["/", "/metrics/", "/metricsx", "/healthz/x", "metrics", "*"])
async def test_there_is_nothing_at_any_other_path(path):
    async with opened() as port:
        assert (await get(port, path))[0] == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "get", "OPTIONS"])
async def test_other_methods_are_refused(method):
    async with opened() as port:
        head, _ = await ask(port, f"{method} /metrics HTTP/1.1\r\n\r\n")
    assert head.startswith("HTTP/1.1 405 ")
    assert "Allow: GET, HEAD" in head


async def test_head_has_the_headers_of_get_and_no_body():
    async with opened() as port:
        got, asked = [
            await ask(port, f"{method} /metrics HTTP/1.1\r\n\r\n") for method in ("GET", "HEAD")
        ]
    assert asked == (got[0], "")


@pytest.mark.parametrize(
    "text",
    ["GET /metrics\r\n\r\n", "\r\n\r\n", "GET  /metrics HTTP/1.1\r\n\r\n", "\x16\x03\r\n\r\n"],
)
async def test_what_is_no_request_is_a_bad_one(text):
    async with opened() as port:
        assert (await ask(port, text))[0].startswith("HTTP/1.1 400 ")


async def test_metrics_come_in_the_form_that_is_asked_for():
    registry = CollectorRegistry()
    Counter("things", "Things.", registry=registry).inc(3)
    async with opened(registry=registry) as port:
        head, body = await ask(port, "GET /metrics HTTP/1.1\r\nAccept: text/plain\r\n\r\n")
        assert "Content-Type: text/plain" in head
        assert "things_total 3.0\n" in body
        form = "application/openmetrics-text; version=1.0.0"
        head, body = await ask(port, f"GET /metrics HTTP/1.1\r\naccept: {form}\r\n\r\n")
        assert f"Content-Type: {form}" in head
        assert body.endswith("# EOF\n")


async def test_metrics_are_collected_once_however_often_they_are_asked_for():
    class Collector:
        num_asked = 0

        def collect(self):
            self.num_asked += 1
            return []

    registry, collector = CollectorRegistry(), Collector()
    registry.register(collector)
    collector.num_asked = 0
    async with opened(registry=registry, fresh_s=1e9) as port:
        for _ in range(5):
            await get(port, "/metrics")
        assert collector.num_asked == 1
    async with opened(registry=registry, fresh_s=-1) as port:
        for _ in range(5):
            await get(port, "/metrics")
        assert collector.num_asked == 6


async def test_connections_are_bounded_and_silent_ones_make_way():
    async with opened(limit_s=1e6) as port:
        silent = [
            await asyncio.open_connection("127.0.0.1", port.port)
            for _ in range(MAX_CONNECTIONS + 40)
        ]
        assert (await get(port, "/healthz"))[0] == 200
        assert port.num_connections <= MAX_CONNECTIONS
        for reader, _ in silent[:41]:
            assert await ended(reader)
        for _, writer in silent:
            writer.close()


async def ended(reader):
    """Returns whether the other side ends the connection without a word."""
    with contextlib.suppress(ConnectionError):
        return await reader.read() == b""
    return True


async def test_a_connection_without_a_request_ends_by_itself():
    async with opened(limit_s=0.01) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port.port)
        writer.write(b"GET /metrics HTTP/1.1\r\n")
        assert await ended(reader)
        writer.close()


async def test_a_head_without_end_ends_its_connection():
    async with opened() as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port.port)
        writer.write(b"GET /metrics HTTP/1.1\r\n" + b"x: y\r\n" * 20_000)
        assert await ended(reader)
        writer.close()


async def test_a_port_that_is_taken_is_named():
    async with opened() as port:
        with pytest.raises(FailedPreconditionError, match=f"metrics on 127.0.0.1:{port.port}"):
            await MetricsPort(Exposition(CollectorRegistry()), lambda: State.LOADING).open(
                "127.0.0.1", port.port
            )


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[127.0.0.1]"])
async def test_a_host_is_a_name_or_an_address_with_or_without_brackets(host):
    port = MetricsPort(Exposition(CollectorRegistry()), lambda: State.SERVING)
    await port.open(host, 0)
    assert port.port > 0
    await port.close()
