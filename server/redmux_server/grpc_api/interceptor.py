"""The one place where errors become statuses, keys are checked and slow readers are dropped."""

import asyncio
import contextlib
import functools
import hashlib
import hmac
import logging
import secrets
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NoReturn, Self

import grpc

from redmux.errors import (
    InvalidArgumentError,
    RedmuxError,
    ResourceExhaustedError,
    UnauthenticatedError,
)
from redmux_server.registry.tenants import ADMIN

logger = logging.getLogger(__name__)

_STALL_S = 30.0
_PUBLIC_PREFIX = "/grpc.health.v1.Health/"  # probes carry no key


class _Malformed:
    """Stands for a message that does not parse."""


class ApiKeys:
    """The keys that are let in; none lets everybody in."""

    def __init__(self, keys: Sequence[str], admin_key: str = "") -> None:
        """`admin_key` is let in, too, if it is not empty."""
        admin_keys = [admin_key] if admin_key else []
        self._digests = [_digest(key) for key in (*admin_keys, *keys)]
        self._admin_digests = [_digest(key) for key in admin_keys]

    def tenant(self, context: Any) -> str:
        """Returns a name for the caller's key, `ADMIN` for the admin key, "" where none is needed.

        The same key has the same name in every run. Raises UnauthenticatedError for a missing or
        unknown key.
        """
        if not self._digests:
            return ""
        header = dict(context.invocation_metadata() or ()).get("authorization", "")
        kind, _, key = str(header).partition(" ")
        digest = _digest(key)
        known = [hmac.compare_digest(digest, other) for other in self._digests]
        if kind.lower() != "bearer" or not any(known):
            raise UnauthenticatedError("missing or unknown API key")
        return ADMIN if digest in self._admin_digests else _tenant(digest)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


@functools.lru_cache(maxsize=4096)
def _tenant(digest: bytes) -> str:
    """Returns the name of a key that is let in; takes milliseconds, once for each.

    It is written to disk as the owner of adapters, so trying out keys against it has to be dear.
    """
    name = hashlib.scrypt(digest, salt=b"redmux tenant", n=1 << 12, r=8, p=1, dklen=16)
    return f"key-{name.hex()}"


class Interceptor(grpc.aio.ServerInterceptor):
    """Wraps every method: parse, authenticate, run, translate errors.

    An exception that is no RedmuxError is logged with its traceback under an id, and the caller
    sees the id only: grpc.aio would send the exception's text.
    """

    def __init__(self, keys: ApiKeys, stall_s: float = _STALL_S) -> None:
        """`stall_s` is how long a stream waits for a reader before it gives up."""
        self._keys = keys
        self._stall_s = stall_s

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """See grpc.aio.ServerInterceptor."""
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method.startswith(_PUBLIC_PREFIX):
            return handler
        parse = _tolerant(handler.request_deserializer)
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(
                self._unary(handler.unary_unary), parse, handler.response_serializer
            )
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(
                self._stream(handler.unary_stream), parse, handler.response_serializer
            )
        return grpc.stream_stream_rpc_method_handler(  # reflection
            self._stream(handler.stream_stream), parse, handler.response_serializer
        )

    def _unary(self, method: Any) -> Any:
        async def call(request: Any, context: Any) -> Any:
            try:
                self._admit(request, context)
                return await method(request, context)
            except Exception as err:
                await _abort(context, err)

        return call

    def _stream(self, method: Any) -> Any:
        async def call(request: Any, context: Any) -> None:
            try:
                self._admit(request, context)
                async with (
                    _Stall(self._stall_s) as stall,
                    contextlib.aclosing(method(request, context)) as replies,
                ):
                    async for reply in replies:
                        stall.begin()
                        await _write(context, reply)
                        stall.end()
            except Exception as err:
                await _abort(context, err)

        return call

    def _admit(self, request: Any, context: Any) -> None:
        self._keys.tenant(context)
        if isinstance(request, _Malformed):
            raise InvalidArgumentError("the request is no valid protobuf message of this method")


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


async def _write(context: Any, reply: Any) -> None:
    """Writes a reply; ends the call as a cancelled one where its client is gone."""
    try:
        await context.write(reply)
    except grpc.aio.InternalError:  # gRPC could not hand it over, and has nobody to tell
        logger.debug("a client went away while a reply was written to it")
        raise asyncio.CancelledError from None


def _tolerant(parse: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    if parse is None:
        return None

    def parse_or_mark(data: bytes) -> Any:
        try:
            return parse(data)
        except Exception:
            return _Malformed()

    return parse_or_mark


async def _abort(context: Any, err: Exception) -> NoReturn:
    if isinstance(err, grpc.aio.AbortError):
        raise err
    if not isinstance(err, RedmuxError):
        error_id = secrets.token_hex(6)
        logger.error("internal error %s", error_id, exc_info=err)
        err = RedmuxError(f"internal error, id {error_id}")
    metadata = [("redmux-error", type(err).__name__)]
    if isinstance(err, ResourceExhaustedError) and err.retry_after_s is not None:
        metadata.append(("grpc-retry-pushback-ms", str(round(1000 * err.retry_after_s))))
    await context.abort(err.status, err.message, tuple(metadata))
    raise AssertionError("abort does not return")
