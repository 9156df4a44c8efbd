"""Connection: HTTP/1.1 of uvicorn's on one socket, with a limit on everything a peer may hold."""

import asyncio
import logging
import time
from dataclasses import dataclass
from email.utils import formatdate
from typing import Any

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from redmux_server.http_api.errors import Refusal, response_bytes

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a connection may hold, and for how long."""

    connections: int
    head_bytes: int = 32 << 10  # of a request line with its headers
    head_s: float = 10.0  # for them to come
    rest_s: float = 10.0  # for what is left of a body whose answer is complete
    idle_s: float = 75.0  # without a request: longer than clients and balancers keep them
    stall_s: float = 30.0  # that a peer may read nothing


class Connection(HttpToolsProtocol):
    """One peer. What it started ends when it goes away.

    Answers go out as they come, but no more than a buffer of them: who writes waits for the reader,
    and a reader that takes too long loses its connection.
    """

    def __init__(self, config: Config, state: ServerState, limits: Limits) -> None:
        super().__init__(config, state, {})
        self._limits = limits
        self._task: asyncio.Task[None] | None = None  # of the request under way
        self._num_head_bytes = 0
        self._is_in_head = True
        self._timer: asyncio.TimerHandle | None = None  # for what the peer has to send now
        self._stall: asyncio.TimerHandle | None = None  # for the peer to read
        self.is_lost = False

    @property
    def peer(self) -> str:
        """A name for the other side."""
        return "unix" if self.client is None else f"{self.client[0]}:{self.client[1]}"

    async def drained(self) -> None:
        """Waits until little of what was written is left to be sent."""
        if self.flow.write_paused:
            await self.flow.drain()

    def abort(self) -> None:
        """Ends the connection at once."""
        self.transport.abort()

    # -- what asyncio calls -------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        if len(self.connections) >= self._limits.connections:
            peers = (peer for peer in self.connections if isinstance(peer, Connection))
            idle = next((peer for peer in peers if not peer.is_busy), None)
            if idle is None:
                self.transport = transport  # type: ignore[assignment]
                self.abort()
                return
            self.connections.discard(idle)
            idle.abort()
        super().connection_made(transport)  # type: ignore[arg-type]
        self._wait(self._limits.head_s)

    @property
    def is_busy(self) -> bool:
        """Whether a request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self.is_lost = True
        was_busy = self.is_busy
        self._wait(None)
        self.resume_writing()
        super().connection_lost(exc)
        if was_busy and self._task is not None:
            self._task.cancel()

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        self._unset_keepalive_if_required()
        began_in_head = self._is_in_head
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # nothing to upgrade to: it is answered as the request that it is
        except httptools.HttpParserError:
            if self._num_head_bytes > self._limits.head_bytes:
                self._refuse_head()
            else:
                self._refuse(Refusal("this is no HTTP/1.1 request", code="bad_http"))
            return
        if began_in_head and self._is_in_head:
            # What comes as one header is not told before its end.
            self._num_head_bytes += len(data)
            if self._num_head_bytes > self._limits.head_bytes:
                self._refuse_head()

    def pause_writing(self) -> None:
        """See asyncio.Protocol."""
        super().pause_writing()
        if self._stall is None:
            self._stall = self.loop.call_later(self._limits.stall_s, self._end_stalled)

    def resume_writing(self) -> None:
        """See asyncio.Protocol."""
        if self.flow is not None:
            super().resume_writing()
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    # -- what the parser calls ----------------------------------------------------------------

    def on_message_begin(self) -> None:
        """See HttpToolsProtocol."""
        super().on_message_begin()
        self._num_head_bytes = 0
        self._is_in_head = True
        if not self.is_busy:
            self._wait(self._limits.head_s)
        self.scope["redmux"] = self  # type: ignore[typeddict-unknown-key]

    def on_url(self, url: bytes) -> None:
        """See HttpToolsProtocol."""
        self._count_head(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """See HttpToolsProtocol; trailers of a body come here, too."""
        self._count_head(len(name) + len(value) + 4)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """See HttpToolsProtocol."""
        self._is_in_head = False
        self._wait(None)
        self.server_state.default_headers = _date()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """See HttpToolsProtocol."""
        if not self.is_busy:
            self._wait(None)
        super().on_message_complete()

    # -- what uvicorn calls -------------------------------------------------------------------

    def on_response_complete(self) -> None:
        """See HttpToolsProtocol."""
        has_rest = self.cycle.more_body and not self.pipeline
        super().on_response_complete()
        if self.transport.is_closing():
            if self.transport.get_write_buffer_size():
                self.loop.call_later(self._limits.stall_s, self.transport.abort)
        elif has_rest:
            self._wait(self._limits.rest_s)
        elif self._is_in_head:  # of the next request, which began during this one
            self._wait(self._limits.head_s)

    def timeout_keep_alive_handler(self) -> None:
        """See HttpToolsProtocol."""
        self.abort()  # what it has not read by now it does not want

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._task = self.loop.create_task(cycle.run_asgi(app))
        self._task.add_done_callback(self.tasks.discard)
        self.tasks.add(self._task)

    # -----------------------------------------------------------------------------------------

    def _count_head(self, num_bytes: int) -> None:
        self._num_head_bytes += num_bytes
        if self._num_head_bytes > self._limits.head_bytes:
            raise ValueError("the head is too large")  # which the parser tells as its own error

    def _wait(self, limit_s: float | None) -> None:
        """Gives the peer a time to send what it has to send; None is no limit."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if limit_s is None else self.loop.call_later(limit_s, self.abort)

    def _end_stalled(self) -> None:
        logger.debug("a client did not read for %g s", self._limits.stall_s)
        self.abort()

    def _refuse_head(self) -> None:
        self._refuse(
            Refusal(
                f"the request line and headers have more than {self._limits.head_bytes} bytes",
                status=431, code="headers_too_large",
            )
        )  # fmt: skip

    def _refuse(self, refusal: Refusal) -> None:
        """Answers what cannot be read on, and ends the connection."""
        if not self.is_busy:
            self.transport.write(response_bytes(refusal))
        self.transport.close()


_dated: tuple[int, list[tuple[bytes, bytes]]] = (0, [])


def _date() -> list[tuple[bytes, bytes]]:
    """Returns the header that tells the time, made once in a second."""
    global _dated
    now = int(time.time())
    if _dated[0] != now:
        _dated = now, [(b"date", formatdate(now, usegmt=True).encode())]
    return _dated[1]
