"""MetricsPort: /metrics, /healthz and /readyz over HTTP, for a known number of connections."""

import asyncio
import enum
import logging
import math
import socket
from collections.abc import Callable

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from redmux.errors import FailedPreconditionError

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 64
_LIMIT_S = 10.0  # of a connection, which brings one request
_FRESH_S = 1.0
_HEAD_BYTES = 8 << 10
_TEXT = "text/plain; charset=utf-8"


class State(enum.Enum):
    """What a server does, in words for people."""

    LOADING = "loading"
    SERVING = "serving"
    STUCK = "stuck: no step of the engine ends"
    DRAINING = "draining"
    DEAD = "dead: the engine has failed"

    @property
    def is_healthy(self) -> bool:
        """Whether nobody has to start the process again."""
        return self is not State.DEAD


class Exposition:
    """The metrics as text, collected once in a while however often they are asked for."""

    def __init__(self, registry: CollectorRegistry, fresh_s: float = _FRESH_S) -> None:
        """The same is told again for `fresh_s`: collecting takes milliseconds."""
        self._registry = registry
        self._fresh_s = fresh_s
        self._collected: dict[str, tuple[float, bytes]] = {}  # by type: when, and what

    def text(self, accept: str) -> tuple[str, bytes]:
        """Returns the content type that fits a header `Accept`, and the metrics in it."""
        encode, content_type = choose_encoder(accept)
        now_s = asyncio.get_running_loop().time()
        since_s, body = self._collected.get(content_type, (-math.inf, b""))
        if now_s - since_s > self._fresh_s:
            body = encode(self._registry)
            self._collected[content_type] = now_s, body
        return content_type, body


class MetricsPort:
    """Answers GET and HEAD of three paths, on the event loop that opens it.

    `/healthz` is 200 unless the engine is dead, `/readyz` only while the server serves. A peer that
    sends no request holds a connection for seconds at most, or until others need it.
    """

    def __init__(
        self,
        metrics: Exposition,
        state: Callable[[], State],
        limit_s: float = _LIMIT_S,
    ) -> None:
        """`state` is asked at every request."""
        self._exposition = metrics
        self._state = state
        self._limit_s = limit_s
        self._connections: dict[asyncio.Task[None], None] = {}  # the oldest first
        self.port = 0

    @property
    def num_connections(self) -> int:
        """How many connections are open."""
        return len(self._connections)

    async def open(self, host: str, port: int) -> None:
        """Starts to answer; raises FailedPreconditionError where the port cannot be had."""
        try:
            listening = listen(host.strip("[]"), port)
            self._server = await asyncio.start_server(
                self._accept, sock=listening, limit=_HEAD_BYTES
            )
        except OSError as err:
            raise FailedPreconditionError(f"cannot serve metrics on {host}:{port}: {err}") from err
        self.port = listening.getsockname()[1]

    async def close(self) -> None:
        """Frees the port and ends what is open."""
        self._server.close()
        for connection in tuple(self._connections):
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._connections) >= MAX_CONNECTIONS:
            oldest = next(iter(self._connections))
            del self._connections[oldest]
            oldest.cancel()
        task = asyncio.current_task()
        assert task is not None
        self._connections[task] = None
        try:
            async with asyncio.timeout(self._limit_s):
                writer.write(self._answer(await reader.readuntil(b"\r\n\r\n")))
                writer.close()
                await writer.wait_closed()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as e:
            logger.debug("a connection for metrics ended: %r", e)
        except asyncio.CancelledError:  # for a newer one, or by `close`
            pass
        finally:
            writer.transport.abort()
            self._connections.pop(task, None)

    def _answer(self, head: bytes) -> bytes:
        first, *lines = head.decode("latin-1").split("\r\n")
        words = first.split(" ")
        if len(words) != 3 or not words[2].startswith("HTTP/1."):
            return _response("400 Bad Request", "this is no HTTP/1.1 request\n")
        method, target, _ = words
        if method not in ("GET", "HEAD"):
            return _response("405 Method Not Allowed", "GET and HEAD only\n", "Allow: GET, HEAD")
        fields = (line.partition(":") for line in lines)
        headers = {name.strip().lower(): value.strip() for name, _, value in fields}
        response = self._get(target.partition("?")[0], headers.get("accept", ""))
        return response.partition(b"\r\n\r\n")[0] + b"\r\n\r\n" if method == "HEAD" else response

    def _get(self, path: str, accept: str) -> bytes:
        if path == "/metrics":
            return self._metrics(accept)
        state = self._state()
        if path == "/healthz":
            is_well = state.is_healthy
        elif path == "/readyz":
            is_well = state is State.SERVING
        else:
            return _response("404 Not Found", "there are /metrics, /healthz and /readyz\n")
        return _response("200 OK" if is_well else "503 Service Unavailable", f"{state.value}\n")

    def _metrics(self, accept: str) -> bytes:
        content_type, body = self._exposition.text(accept)
        return _response("200 OK", body, f"Content-Type: {content_type}")


def listen(host: str, port: int) -> socket.socket:
    """Returns a socket that listens on the first address of a host."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    return socket.create_server(address[:2], family=family)


def _response(status: str, body: str | bytes, *headers: str) -> bytes:
    if isinstance(body, str):
        body, headers = body.encode(), (f"Content-Type: {_TEXT}", *headers)
    lines = [f"HTTP/1.1 {status}", *headers, f"Content-Length: {len(body)}", "Connection: close"]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body
