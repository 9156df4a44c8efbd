"""The one place where keys are checked, messages are bounded and errors become statuses."""

import asyncio
import contextlib
import inspect
import logging
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import grpc

from redmux.errors import (
    InvalidArgumentError,
    RedmuxError,
    ResourceExhaustedError,
)
from redmux_server.grpc_api.call_keys import CallKeys
from redmux_server.grpc_api.refusals import Refusals
from redmux_server.in_flight import LARGEST, CallBytes, InFlight
from redmux_server.internal_errors import told
from redmux_server.keys import ApiKeys

logger = logging.getLogger(__name__)

_STALL_S = 30.0
PUBLIC_PREFIX = "/grpc.health.v1.Health/"  # probes carry no key
# Anybody may send a probe, of any size. These few are taken at a time, each within a second.
_PROBES_RECEIVED = 2
_PROBE_S = 1.0
_SMALL_BYTES = 64 << 10  # of a request to a method that takes no data


class Interceptor(grpc.aio.ServerInterceptor):
    """Wraps every method: authenticate, receive, parse, run, translate errors.

    gRPC is told that every method takes a stream of requests, which looks the same on the wire: it
    then starts a method before it takes the request, so a caller without a key has sent no more
    than HTTP/2's first window when the call ends. `InFlight` counts all messages.

    An exception that is no RedmuxError is logged with its traceback under an id, and the caller
    sees the id only: grpc.aio would send the exception's text.
    """

    def __init__(
        self,
        keys: ApiKeys,
        in_flight: InFlight | None = None,
        stall_s: float = _STALL_S,
        refusals: Refusals | None = None,
    ) -> None:
        """`stall_s` is how long a stream waits for its reader, or a call for its request."""
        self._keys = CallKeys(keys)
        self._refusals = refusals or Refusals()
        self._in_flight = in_flight or InFlight()
        # Probes have to come through whatever others hold.
        self._probes = InFlight(sys.maxsize, sys.maxsize, receiving=_PROBES_RECEIVED)
        self._limits: Mapping[str, int] = {}
        self._stall_s = stall_s

    def set_limits(self, limits: Mapping[str, int]) -> None:
        """Sets the most bytes of a request by method ("/package.Service/Method").

        Methods that are not in it take no data to speak of.
        """
        self._limits = limits
        self._in_flight.fit(max(limits.values()))

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """See grpc.aio.ServerInterceptor."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        name = handler_call_details.method
        door = _Doorway(
            method=name,
            is_public=name.startswith(PUBLIC_PREFIX),
            parse=handler.request_deserializer,
            max_bytes=self._limits.get(name, _SMALL_BYTES),
        )
        if handler.unary_unary is not None:
            return grpc.stream_unary_rpc_method_handler(
                self._unary(door, handler.unary_unary, handler.response_serializer)
            )
        if handler.unary_stream is not None:
            return grpc.stream_stream_rpc_method_handler(
                self._stream(door, handler.unary_stream), None, handler.response_serializer
            )
        return grpc.stream_stream_rpc_method_handler(  # reflection
            self._both_stream(door, handler.stream_stream), None, handler.response_serializer
        )

    def _unary(self, door: "_Doorway", method: Any, serialize: Callable[[Any], bytes]) -> Any:
        async def run(context: Any) -> bytes:
            held, request = await self._let_in(door, context)
            reply = serialize(await method(request, context))
            held.take(len(reply))  # until gRPC has sent it
            return reply

        return _with_status(run)

    def _stream(self, door: "_Doorway", method: Any) -> Any:
        async def run(context: Any) -> None:
            _, request = await self._let_in(door, context)
            replies = method(request, context)
            if inspect.isawaitable(replies):  # health's Watch, which writes by itself
                await replies
            else:
                await self._write_all(replies, context)

        return _with_status(run)

    def _both_stream(self, door: "_Doorway", method: Any) -> Any:
        async def requests(context: Any) -> AsyncGenerator[Any]:
            while (data := await context.read()) is not grpc.aio.EOF:
                yield door.parsed(data)

        async def run(context: Any) -> None:
            with self._noting_refusals(door, context):
                held = self._begin(door, context)
                # One message of it may be on its way at any time, whatever its size.
                held.take(self._in_flight.share_bytes // LARGEST)
            async with contextlib.aclosing(requests(context)) as messages:
                await self._write_all(method(messages, context), context)

        return _with_status(run)

    async def _let_in(self, door: "_Doorway", context: Any) -> tuple[CallBytes, Any]:
        with self._noting_refusals(door, context):
            held = self._begin(door, context)
            return held, await self._receive(door, held, context)

    @contextlib.contextmanager
    def _noting_refusals(self, door: "_Doorway", context: Any) -> Iterator[None]:
        try:
            yield
        except RedmuxError as err:
            if not door.is_public:
                self._refusals.add(err, door.method, context.peer())
            raise

    def _begin(self, door: "_Doorway", context: Any) -> CallBytes:
        """Lets a call in, or raises what is in its way. Nothing of its request was read by then."""
        if door.is_public:
            held = self._probes.begin("")
        else:
            held = self._in_flight.begin(self._keys.tenant(context) or context.peer())
        context.add_done_callback(held.end)
        return held

    async def _receive(self, door: "_Doorway", held: CallBytes, context: Any) -> Any:
        if door.is_public and held.must_wait:
            return door.parsed(b"")  # as if it had asked for the server as a whole
        limit_s = min(self._stall_s, _PROBE_S) if door.is_public else self._stall_s
        data = await held.receive(context.read, limit_s)
        if data is grpc.aio.EOF:
            raise InvalidArgumentError("the call ended without a request")
        held.take(len(data))
        return door.parsed(data)

    async def _write_all(self, replies: AsyncGenerator[Any], context: Any) -> None:
        async with _Stall(self._stall_s) as stall, contextlib.aclosing(replies):
            is_first = True
            async for reply in replies:
                stall.begin()
                if is_first:
                    # By itself: gRPC refuses to end a call whose headers go with a pending write.
                    await _sent(context.send_initial_metadata(()))
                    is_first = False
                await _sent(context.write(reply))
                stall.end()


@dataclass(frozen=True, slots=True)
class _Doorway:
    """What a method lets in."""

    method: str
    is_public: bool  # without a key
    parse: Callable[[bytes], Any]
    max_bytes: int

    def parsed(self, data: bytes) -> Any:
        """Returns the message; raises ResourceExhaustedError or InvalidArgumentError."""
        if len(data) > self.max_bytes:
            raise ResourceExhaustedError(
                f"the request has {len(data)} bytes; this method takes at most {self.max_bytes}"
            )
        try:
            return self.parse(data)
        except Exception:
            raise InvalidArgumentError(
                "the request is no valid protobuf message of this method"
            ) from None


class _Stall:
    """Ends a stream whose reader takes nothing for `limit_s` seconds.

    One timer for the whole stream: a timeout around every write costs more than the write's share
    of the event loop.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._loop = asyncio.get_running_loop()
        self._timeout = asyncio.timeout(None)
        self._since_s: float | None = None  # when the write that is under way began

    def begin(self) -> None:
        """Says that a write begins."""
        self._since_s = self._loop.time()

    def end(self) -> None:
        """Says that it is done."""
        self._since_s = None

    async def __aenter__(self) -> Self:
        await self._timeout.__aenter__()
        self._timer = self._loop.call_later(self._limit_s, self._check)
        return self

    async def __aexit__(self, *exception: Any) -> None:
        self._timer.cancel()
        try:
            await self._timeout.__aexit__(*exception)
        except TimeoutError:
            raise ResourceExhaustedError(
                f"the client did not read for {self._limit_s:g} s"
            ) from None

    def _check(self) -> None:
        now_s = self._loop.time()
        due_s = (now_s if self._since_s is None else self._since_s) + self._limit_s
        if due_s <= now_s:
            self._timeout.reschedule(now_s)
        else:
            self._timer = self._loop.call_at(due_s, self._check)


async def _sent(sending: Awaitable[None]) -> None:
    """Waits until something is sent; ends the call as a cancelled one where its client is gone."""
    try:
        await sending
    except grpc.aio.InternalError:  # gRPC could not hand it over, and has nobody to tell
        logger.debug("a client went away while something was sent to it")
        raise asyncio.CancelledError from None


def _with_status(run: Callable[[Any], Awaitable[Any]]) -> Any:
    """Returns the method that gRPC calls; it ends with the status of the error that `run` raises.

    gRPC keeps the error that it raises itself, in a cycle that only the garbage collector finds. So
    nothing large may hang on it: neither the frames that raised, nor those that hold the messages.
    """

    async def call(_: Any, context: Any) -> Any:
        try:
            return await run(context)
        except Exception as err:
            failure = err if isinstance(err, grpc.aio.AbortError) else told(err)
        if isinstance(failure, RedmuxError):
            failure = await _aborted(context, failure)
        del context
        raise failure.with_traceback(None)

    return call


async def _aborted(context: Any, err: RedmuxError) -> grpc.aio.AbortError:
    """Ends a call with the status of an error; returns what gRPC wants to be raised for it."""
    metadata = [("redmux-error", type(err).__name__)]
    if isinstance(err, ResourceExhaustedError) and err.retry_after_s is not None:
        metadata.append(("grpc-retry-pushback-ms", str(round(1000 * err.retry_after_s))))
    try:
        await _sent(context.abort(err.status, err.message, tuple(metadata)))
    except grpc.aio.AbortError as abort:
        return abort
    raise AssertionError("abort does not return")
