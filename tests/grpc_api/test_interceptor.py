"""The interceptor's basics, on handlers of our own: keys, tenants, and errors as statuses."""

import asyncio
import logging
from types import SimpleNamespace

import grpc
import pytest

from redmux.errors import (
    NotFoundError,
    ResourceExhaustedError,
    UnauthenticatedError,
)
from redmux_server.grpc_api.call_keys import CallKeys
from redmux_server.grpc_api.interceptor import Interceptor
from redmux_server.grpc_api.refusals import Refusals
from redmux_server.in_flight import CALL_BYTES, InFlight
from redmux_server.keys import ApiKeys


class Context:
    """What grpc.aio hands to a method."""

    def __init__(self, *metadata, request=b"a request"):
        self._metadata = metadata
        self._request = request
        self.was_read = False
        self.sent_headers = 0
        self.written = []
        self.aborted = None
        self.done_callbacks = []

    def invocation_metadata(self):
        return self._metadata

    def peer(self):
        return "ipv4:127.0.0.1:1"

    def add_done_callback(self, callback):
        self.done_callbacks.append(callback)

    async def read(self):
        self.was_read = True
        return self._request

    async def send_initial_metadata(self, metadata):
        self.sent_headers += 1

    async def write(self, message):
        self.written.append(message)

    async def abort(self, code, details, metadata):
        self.aborted = (code, details, dict(metadata))
        raise grpc.aio.AbortError


def bearer(text, **options):
    return Context(("authorization", text), **options)


def test_a_call_without_metadata_has_no_key():
    context = SimpleNamespace(invocation_metadata=lambda: None)
    with pytest.raises(UnauthenticatedError):
        CallKeys(ApiKeys(["one"])).tenant(context)
    assert CallKeys(ApiKeys([])).tenant(context) == ""


def test_a_call_brings_its_key_in_its_metadata():
    assert CallKeys(ApiKeys(["one"])).tenant(bearer("Bearer one")).startswith("key-")


def parse(data):
    if data == b"\xff":
        raise ValueError
    return data


def unary(method):
    return grpc.unary_unary_rpc_method_handler(method, parse, lambda reply: reply)


def streaming(method):
    return grpc.unary_stream_rpc_method_handler(method, parse)


async def wrapped(handler, keys=(), method="/redmux.v1.X/Y", in_flight=None, **options):
    """Returns the method that gRPC calls in place of the handler's own."""

    async def continuation(details):
        return handler

    guard = Interceptor(ApiKeys(keys), in_flight, **options)
    guarded = await guard.intercept_service(continuation, SimpleNamespace(method=method))
    return guarded and (guarded.stream_unary or guarded.stream_stream)


async def aborted(call, context):
    with pytest.raises(grpc.aio.AbortError):
        await call(None, context)
    return context.aborted


def failing(error):
    async def method(request, context):
        raise error

    return unary(method)


async def test_an_error_becomes_its_status_message_and_class():
    handler = await wrapped(failing(NotFoundError("no adapter 'x'")))
    code, details, metadata = await aborted(handler, Context())
    assert (code, details) == (grpc.StatusCode.NOT_FOUND, "no adapter 'x'")
    assert metadata == {"redmux-error": "NotFoundError"}


async def test_a_full_server_tells_grpc_when_to_try_again():
    error = ResourceExhaustedError("full", retry_after_s=0.25)
    _, _, metadata = await aborted(await wrapped(failing(error)), Context())
    assert metadata["grpc-retry-pushback-ms"] == "250"


async def test_an_unexpected_error_is_logged_under_the_id_that_the_caller_sees(caplog):
    handler = await wrapped(failing(ValueError("a secret")))
    with caplog.at_level(logging.ERROR):
        code, details, _ = await aborted(handler, Context())
    assert code is grpc.StatusCode.INTERNAL
    assert "secret" not in details
    assert details.removeprefix("internal error, id ") in caplog.text
    assert "ValueError: a secret" in caplog.text


async def test_an_abort_of_the_method_itself_passes():
    context = Context()

    async def method(request, context):
        await context.abort(grpc.StatusCode.DATA_LOSS, "mine", ())

    code, details, _ = await aborted(await wrapped(unary(method)), context)
    assert (code, details) == (grpc.StatusCode.DATA_LOSS, "mine")


async def test_a_method_that_is_not_there_stays_so():
    assert await wrapped(None) is None


async def never(request, context):
    raise AssertionError("the method was called")


@pytest.mark.parametrize("kind", [unary, streaming])
async def test_without_the_key_the_request_is_not_even_read(kind):
    call = await wrapped(kind(never), keys=["one"])
    context = bearer("Bearer two", request=b"\xff")
    assert (await aborted(call, context))[0] is grpc.StatusCode.UNAUTHENTICATED
    assert not context.was_read


@pytest.mark.parametrize(
    ("request_bytes", "code", "error"),
    [
        (b"\xff", grpc.StatusCode.INVALID_ARGUMENT, "InvalidArgumentError"),
        (grpc.aio.EOF, grpc.StatusCode.INVALID_ARGUMENT, "InvalidArgumentError"),
        (b"x" * 65_537, grpc.StatusCode.RESOURCE_EXHAUSTED, "ResourceExhaustedError"),
    ],
)
async def test_a_request_that_is_malformed_missing_or_too_large_does_not_reach_its_method(
    request_bytes, code, error
):
    context = bearer("Bearer one", request=request_bytes)
    got = await aborted(await wrapped(unary(never), keys=["one"]), context)
    assert (got[0], got[2]["redmux-error"]) == (code, error)


async def echo(request, context):
    return request


@pytest.mark.parametrize(
    ("method", "is_public"),
    [("/grpc.health.v1.Health/Check", True), ("/grpc.health.v1.HealthX/Check", False)],
)
async def test_health_alone_needs_no_key(method, is_public):
    call, context = await wrapped(unary(echo), ["one"], method), Context()
    if is_public:
        assert await call(None, context) == b"a request"
    else:
        assert (await aborted(call, context))[0] is grpc.StatusCode.UNAUTHENTICATED


async def test_calls_without_a_key_are_counted_and_told_once_a_minute_without_what_they_gave(
    caplog,
):
    counted, now_s = [], [100.0]
    refusals = Refusals(counted.append, lambda: now_s[0])
    call = await wrapped(unary(never), keys=["one"], refusals=refusals)
    stream = await wrapped(streaming(never), keys=["one"], refusals=refusals)
    for method in (call, stream, call):
        await aborted(method, bearer("Bearer s3cret"))
    now_s[0] += 59
    await aborted(call, Context())
    assert counted == ["unauthenticated"] * 4
    assert len(caplog.messages) == 1
    now_s[0] += 1
    await aborted(call, Context())
    first, second = caplog.messages
    assert ": 1 since" in first
    assert ": 4 since" in second
    assert "from ipv4:127.0.0.1:1 to /redmux.v1.X/Y" in second
    assert "s3cret" not in caplog.text


async def test_what_else_is_refused_at_the_door_is_counted_once_and_not_told(caplog):
    counted = []
    options = {"keys": ["one"], "refusals": Refusals(counted.append)}
    full = await wrapped(unary(never), in_flight=InFlight(0, 0), **options)
    await aborted(full, bearer("Bearer one"))
    await aborted(await wrapped(unary(never), **options), bearer("Bearer one", request=b"\xff"))
    await aborted(await wrapped(failing(NotFoundError("x")), **options), bearer("Bearer one"))
    probe = await wrapped(unary(never), method="/grpc.health.v1.Health/Check", **options)
    await aborted(probe, Context(request=b"\xff"))
    assert counted == ["resource_exhausted", "invalid_argument"]
    assert caplog.messages == []


async def test_a_request_that_does_not_come_ends_its_call():
    class Silent(Context):
        async def read(self):
            await asyncio.Event().wait()

    code, details, _ = await aborted(await wrapped(unary(never), stall_s=0.01), Silent())
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "did not arrive" in details


async def test_what_a_call_held_is_given_back_when_it_has_ended():
    in_flight = InFlight()
    context = Context()
    await (await wrapped(unary(echo), in_flight=in_flight))(None, context)
    assert in_flight.num_bytes == CALL_BYTES + 2 * len(b"a request")
    for callback in context.done_callbacks:
        callback(context)
    assert (in_flight.num_bytes, in_flight.num_callers) == (0, 0)


async def test_replies_that_wait_for_their_reader_are_bounded_for_each_key_and_for_all():
    async def large(request, context):
        return b"x" * 1000

    room = 2 * (CALL_BYTES + 2000)
    in_flight = InFlight(room, room + 1000)
    call = await wrapped(unary(large), ["one", "two"], in_flight=in_flight)
    one, two = (lambda: bearer("Bearer one")), (lambda: bearer("Bearer two"))
    for _ in range(2):
        await call(None, one())
    code, details, _ = await aborted(call, one())
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "you have not read" in details
    code, details, _ = await aborted(call, two())
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "of all callers" in details


async def test_a_probe_beside_many_is_answered_unread_as_one_of_the_whole_server():
    class Slow(Context):
        async def read(self):
            await asyncio.Event().wait()

    call = await wrapped(unary(echo), ["one"], "/grpc.health.v1.Health/Check")
    slow = [asyncio.ensure_future(call(None, Slow())) for _ in range(2)]
    await asyncio.sleep(0)
    context = Context()
    assert await call(None, context) == b""
    assert not context.was_read
    for task in slow:
        task.cancel()
    await asyncio.gather(*slow, return_exceptions=True)
    assert await call(None, context) == b"a request"


async def test_probes_come_through_whatever_callers_hold():
    in_flight = InFlight(0, 0)
    call = await wrapped(unary(echo), (), "/grpc.health.v1.Health/Check", in_flight)
    assert await call(None, Context()) == b"a request"


async def test_a_stream_that_fails_has_written_what_came_before():
    async def method(request, context):
        yield "a"
        yield "b"
        raise NotFoundError("gone")

    context = Context()
    code, *_ = await aborted(await wrapped(streaming(method)), context)
    assert context.written == ["a", "b"]
    assert code is grpc.StatusCode.NOT_FOUND


async def test_a_stream_without_the_key_never_starts():
    started = []

    async def method(request, context):
        started.append(True)
        yield "a"

    context = Context()
    assert (await aborted(await wrapped(streaming(method), keys=["one"]), context))[
        0
    ] is grpc.StatusCode.UNAUTHENTICATED
    assert started == context.written == []


async def test_a_client_that_goes_away_during_a_write_is_no_error_of_the_server(caplog):
    closed = []

    async def method(request, context):
        try:
            yield "a"
            raise AssertionError("the method was asked for more")
        finally:
            closed.append(True)

    class Gone(Context):
        async def write(self, message):
            raise grpc.aio.InternalError("Failed grpc_call_start_batch")

    call = await wrapped(streaming(method))
    context = Gone()
    with caplog.at_level(logging.INFO), pytest.raises(asyncio.CancelledError):
        await call(None, context)
    assert (closed, context.aborted, caplog.text) == ([True], None, "")
