"""Gate: what every request passes before its handler: id, key, size, time; and on its way out."""

import asyncio
import re
import secrets
import sys
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, NamedTuple

import msgspec

from redmux.errors import RedmuxError, UnavailableError
from redmux_server.http_api.connection import Connection
from redmux_server.http_api.cors import Cors
from redmux_server.http_api.errors import (
    Refusal,
    body_of,
    error_event,
    headers_of,
    status_of,
)
from redmux_server.http_api.health import Health
from redmux_server.in_flight import CallBytes, InFlight
from redmux_server.internal_errors import told
from redmux_server.keys import ApiKeys

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# Without a key: probes, scrapers and pages for people, which bring no body.
PUBLIC = frozenset(("/health", "/ready", "/version", "/metrics", "/openapi.json", "/docs"))
_PAGE = re.compile("/|/page/.*")  # the page for people, and its files
_BODY_BYTES = 4 << 20  # of a request, where its path has no limit of its own
_RECEIVE_S = 30.0
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
_JSON = (b"content-type", b"application/json")


class Caller(NamedTuple):
    """Who sent a request, for its handler."""

    tenant: str
    request_id: str
    headers: Mapping[bytes, bytes]


class Gate:
    """The application that uvicorn calls; every request is UNAVAILABLE until `open`.

    A caller is an API key, or a connection where none is needed. What all of them hold is counted
    together with what gRPC holds.
    """

    def __init__(
        self, keys: ApiKeys, in_flight: InFlight, health: Health, cors: Cors,
        receive_s: float = _RECEIVE_S,
    ) -> None:  # fmt: skip
        """`receive_s` is how long the body of a request may take."""
        self._keys = keys
        self._in_flight = in_flight
        # Probes have to come through whatever others hold; they bring no body.
        self._probes = InFlight(sys.maxsize, sys.maxsize)
        self._health = health
        self._cors = cors
        self._receive_s = receive_s
        self._app: App | None = None
        self._limits: Mapping[str, int] = {}
        self.is_closing = False

    def open(self, app: App, limits: Mapping[str, int]) -> None:
        """Hands requests to `app`; `limits` are the most bytes of bodies by beginning of path."""
        self._limits = limits
        self._in_flight.fit(max(_BODY_BYTES, *limits.values()))
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        connection: Connection = scope["redmux"]
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = (
            given if _REQUEST_ID.fullmatch(given) else b"req-" + secrets.token_hex(12).encode()
        )
        cors = self._cors.headers(headers.get(b"origin", b""))
        answer = _Answer(send, connection, [(b"x-request-id", request_id), *cors])
        try:
            if cors and self._cors.is_preflight(scope["method"], headers):
                await answer.send_whole(204, self._cors.preflight, b"")
                return
            await self._serve(scope, receive, answer, headers, request_id.decode())
        except asyncio.CancelledError:
            if connection.is_lost:
                return
            if not self.is_closing:
                raise
            task = asyncio.current_task()
            assert task is not None
            task.uncancel()
            await answer.fail(UnavailableError("the server is shutting down"))
        except Exception as err:
            if not answer.has_ended:  # else whoever ended it has told and logged the error
                await answer.fail(told(err))

    async def _serve(
        self, scope: Scope, receive: Receive, answer: "_Answer", headers: Mapping[bytes, bytes],
        request_id: str,
    ) -> None:  # fmt: skip
        path = scope["path"]
        is_public = path in PUBLIC or _is_page(scope["method"], path)
        authorization = headers.get(b"authorization", b"").decode("latin-1")
        tenant = "" if is_public else self._keys.tenant(authorization)
        if self._app is None:
            if (told_health := self._health.answer(path, headers.get(b"accept", b""))) is None:
                raise UnavailableError("the server is loading its model; try again in a moment")
            status, content_type, body = told_health
            await answer.send_whole(status, [(b"content-type", content_type.encode())], body)
            return
        holds = self._probes if is_public else self._in_flight
        held = holds.begin(tenant or connection_of(scope).peer)
        try:
            limit = 0 if is_public else self._limit(path)
            body = await self._body(receive, held, headers, limit)
            scope["caller"] = Caller(tenant, request_id, headers)
            answer.held = held
            await self._app(scope, _again(body, receive), answer.send)
            if not answer.is_stream:
                await answer.drained()
        finally:
            held.end()

    def _limit(self, path: str) -> int:
        fitting = (most for prefix, most in self._limits.items() if path.startswith(prefix))
        return next(fitting, _BODY_BYTES)

    async def _body(
        self, receive: Receive, held: CallBytes, headers: Mapping[bytes, bytes], limit: int
    ) -> bytes:
        """Returns the whole body, counted before it comes where its length is told."""
        length = int(headers.get(b"content-length", b"0"))
        if length > limit:
            raise _too_large(limit)
        held.take(length)

        async def read() -> bytes:
            pieces: list[bytes] = []
            num_bytes = 0
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    raise asyncio.CancelledError  # the client went away
                piece = message.get("body", b"")
                pieces.append(piece)
                num_bytes += len(piece)
                if num_bytes > limit:
                    raise _too_large(limit)
                if num_bytes > length:
                    held.take(len(piece))
                if not message.get("more_body", False):
                    return pieces[0] if len(pieces) == 1 else b"".join(pieces)

        if length == 0 and b"transfer-encoding" not in headers:
            return b""
        body: bytes = await held.receive(read, self._receive_s)
        return body


def _is_page(method: str, path: str) -> bool:
    return method in ("GET", "HEAD") and _PAGE.fullmatch(path) is not None


def connection_of(scope: Scope) -> Connection:
    """Returns the connection that a request came on."""
    connection: Connection = scope["redmux"]
    return connection


class _Answer:
    """The answer to one request, on its way out."""

    def __init__(
        self, send: Send, connection: Connection, headers: list[tuple[bytes, bytes]]
    ) -> None:
        """`headers` are added to those of the answer."""
        self._send = send
        self._connection = connection
        self._headers = headers
        self._start: MutableMapping[str, Any] | None = None  # not sent before there is a body
        self._has_started = False
        self.held: CallBytes | None = None
        self.is_stream = False
        self.has_ended = False

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """See ASGI."""
        if message["type"] == "http.response.start":
            self._start = message
            return
        has_more = message.get("more_body", False)
        if self._start is not None:
            if has_more:
                self.is_stream = True
            elif self.held is not None:
                self.held.take(len(message.get("body", b"")))  # until it is sent
            start, self._start = self._start, None
            start["headers"] = [*start.get("headers", ()), *self._headers]
            self._has_started = True
            await self._send(start)
        self.has_ended = not has_more
        await self._send(message)

    async def send_whole(
        self, status: int, headers: list[tuple[bytes, bytes]], body: bytes
    ) -> None:
        """Sends an answer of one piece."""
        self.held = None  # counts no error: it is small
        length = [] if status == 204 else [(b"content-length", str(len(body)).encode())]
        await self.send(
            {"type": "http.response.start", "status": status, "headers": [*headers, *length]}
        )
        await self.send({"type": "http.response.body", "body": body})

    async def fail(self, err: RedmuxError) -> None:
        """Ends the answer with an error, as a stream's last event if it is under way."""
        if not self._has_started:
            body = msgspec.json.encode(body_of(err))
            await self.send_whole(status_of(err), [_JSON, *headers_of(err)], body)
        elif self.is_stream:
            await self.send({"type": "http.response.body", "body": error_event(err)})
        else:
            self._connection.abort()

    async def drained(self) -> None:
        """Waits until what was sent has nearly left."""
        await self._connection.drained()


def _too_large(limit: int) -> Refusal:
    return Refusal(
        f"the body of the request has more than {limit} bytes, which is the limit of this path",
        status=413, code="request_too_large",
    )  # fmt: skip


def _again(body: bytes, receive: Receive) -> Receive:
    """Returns what gives a body that was received already, then whatever comes."""
    given = False

    async def receive_again() -> MutableMapping[str, Any]:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_again
