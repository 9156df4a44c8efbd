"""/v1/side_by_side: one request to several models, their streams in one answer.

A browser opens six connections to a server at most, so it cannot read more streams than that.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping, MutableMapping
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from redmux.errors import NotFoundError
from redmux_server.http_api.answers import json_response
from redmux_server.http_api.errors import DONE, Refusal, error_event
from redmux_server.http_api.generating import caller_of
from redmux_server.http_api.schemas.answers import EVENTS
from redmux_server.http_api.schemas.body import Body
from redmux_server.http_api.schemas.other_answers import Stopped
from redmux_server.http_api.sse import EventStream
from redmux_server.http_api.validated import JsonRoute
from redmux_server.internal_errors import told

_MAX_MODELS = 256
_MAX_BYTES = 4 << 20  # of the requests of all models together
_SCOPE = ("type", "asgi", "http_version", "server", "client", "scheme", "redmux", "caller")


class SideBySideBody(Body):
    """A request, and the models that it goes to."""

    path: Literal["/v1/chat/completions", "/v1/completions"]
    models: Annotated[list[str], Field(min_length=1, max_length=_MAX_MODELS)]
    request: dict[str, Any] = Field(description="What is sent to path, without model and stream.")


def router() -> APIRouter:
    """Returns the routes of streams side by side."""
    router = APIRouter(route_class=JsonRoute, tags=["generation"])
    running: dict[tuple[str, str], _Streams] = {}  # by tenant and id of the request

    @router.post("/v1/side_by_side", response_class=Response, responses=EVENTS)
    async def side_by_side(request: Request, body: SideBySideBody) -> Response:
        """Streams the answers of several models; an event's name is its model's place in the list.

        The events of a model are those that it streams alone, errors and [DONE] included.
        """
        caller = caller_of(request)
        key = caller.tenant, caller.request_id
        streams = _Streams(request, body)

        async def events() -> AsyncGenerator[bytes]:
            if key in running:
                raise Refusal(f"a request with the id {caller.request_id!r} is running")
            running[key] = streams
            try:
                async with contextlib.aclosing(streams.events()) as events:
                    async for event in events:
                        yield event
            finally:
                del running[key]

        return EventStream(events(), {})

    @router.delete("/v1/side_by_side/{request_id}/{index}", response_model=Stopped)
    async def stop(request: Request, request_id: str, index: int) -> Response:
        """Stops one model's stream of the request that has this x-request-id."""
        streams = running.get((caller_of(request).tenant, request_id))
        if streams is None or not 0 <= index < streams.num:
            raise NotFoundError(f"no request {request_id[:128]!r} with a model {index} is running")
        streams.stop(index)
        return json_response({"id": request_id, "index": index, "stopped": True})

    return router


class _Streams:
    """The streams of one request, each that of a request of its own to the application."""

    def __init__(self, request: Request, body: SideBySideBody) -> None:
        self._app = request.app
        self._scope = {name: request.scope[name] for name in _SCOPE if name in request.scope}
        self._path = body.path
        self._bodies = [
            msgspec.json.encode({**body.request, "model": model, "stream": True})
            for model in _affordable(body)
        ]
        # At most one piece of each waits for the reader, who thereby slows down all of them.
        self._ready: asyncio.Queue[tuple[int, bytes]] = asyncio.Queue(1)
        self._tasks: list[asyncio.Task[None]] = []
        self._stoppable: set[int] = set()  # those whose answer is under way
        self._is_read = True

    @property
    def num(self) -> int:
        """How many there are."""
        return len(self._bodies)

    def stop(self, index: int) -> None:
        """Ends one; harmless where it ends already."""
        if index in self._stoppable:
            self._stoppable.remove(index)  # a second stop would take the end from the reader
            self._tasks[index].cancel()

    async def events(self) -> AsyncGenerator[bytes]:
        """Yields the events of all as they come; closing it ends all."""
        self._stoppable.update(range(self.num))
        self._tasks = [asyncio.create_task(self._run(index)) for index in range(self.num)]
        num_open = self.num
        try:
            while num_open:
                index, piece = await self._ready.get()
                if piece:
                    yield _named(index, piece)
                else:
                    num_open -= 1
        finally:
            self._is_read = False
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _run(self, index: int) -> None:
        answer = _Answer(index, self._ready)
        try:
            try:
                await self._app(self._scope_of(index), _Given(self._bodies[index]), answer.send)
            finally:
                self._stoppable.discard(index)
        except asyncio.CancelledError:
            if not self._is_read:
                raise
            await self._ready.put((index, DONE))
        except Exception as err:
            if not answer.has_ended:  # else whoever ended it has told and logged the error
                await self._ready.put((index, error_event(told(err))))
        await self._ready.put((index, b""))

    def _scope_of(self, index: int) -> dict[str, Any]:
        length = str(len(self._bodies[index])).encode()
        return {
            **self._scope, "method": "POST", "path": self._path, "raw_path": self._path.encode(),
            "root_path": "", "query_string": b"", "state": {},
            "headers": [(b"content-type", b"application/json"), (b"content-length", length)],
        }  # fmt: skip


class _Given:
    """A body that is there; then nothing comes."""

    def __init__(self, body: bytes) -> None:
        self._message: Mapping[str, Any] | None = {"type": "http.request", "body": body}

    async def __call__(self) -> Mapping[str, Any]:
        """See ASGI's receive."""
        message, self._message = self._message, None
        if message is None:
            await asyncio.Event().wait()
        assert message is not None
        return message


class _Answer:
    """Takes an answer, and hands it on in events: what is no stream is an error."""

    def __init__(self, index: int, ready: asyncio.Queue[tuple[int, bytes]]) -> None:
        self._index = index
        self._ready = ready
        self._is_stream = False
        self.has_ended = False

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """See ASGI."""
        if message["type"] == "http.response.start":
            self._is_stream = message["status"] == 200
            return
        self.has_ended = not message.get("more_body", False)
        if piece := message.get("body", b""):
            event = piece if self._is_stream else b"data: " + piece + b"\n\n" + DONE
            await self._ready.put((self._index, event))


def _affordable(body: SideBySideBody) -> list[str]:
    """Returns the models; raises where their requests come to too many bytes together."""
    num_bytes = len(msgspec.json.encode(body.request)) * len(body.models)
    if num_bytes > _MAX_BYTES:
        raise Refusal(
            f"the request comes to {num_bytes} bytes for {len(body.models)} models, at most "
            f"{_MAX_BYTES} are served; ask fewer at a time",
            status=413, param="models", code="request_too_large",
        )  # fmt: skip
    return body.models


def _named(index: int, piece: bytes) -> bytes:
    """Returns whole events with this name; JSON holds no line breaks."""
    name = b"event: %d\n" % index
    return name + piece.replace(b"\n\ndata: ", b"\n\n" + name + b"data: ")
