"""The interceptor's basics, on handlers of our own: keys, tenants, and errors as statuses."""

import asyncio
import logging
from types import SimpleNamespace

import grpc
import pytest

from redmux.errors import (
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    UnauthenticatedError,
)
from redmux_server.grpc_api.interceptor import ApiKeys, Interceptor
from redmux_server.registry.tenants import ADMIN


class Context:
    """What grpc.aio hands to a method."""

    def __init__(self, *metadata):
        self._metadata = metadata
        self.written = []
        self.aborted = None

    def invocation_metadata(self):
        return self._metadata

    async def write(self, message):
        self.written.append(message)

    async def abort(self, code, details, metadata):
        self.aborted = (code, details, dict(metadata))
        raise grpc.aio.AbortError


def bearer(text):
    return Context(("authorization", text))


@pytest.mark.parametrize("text", ["Bearer one", "bearer one", "BEARER two"])
def test_a_known_key_is_let_in(text):
    assert ApiKeys(["one", "two"]).tenant(bearer(text)).startswith("key-")


@pytest.mark.parametrize(
    "text", ["", "one", "Bearer", "Bearer ", "Bearer on", "Bearer one ", "Bearer ONE", "Basic one"]
)
def test_anything_else_is_refused(text):
    with pytest.raises(UnauthenticatedError, match="missing or unknown API key"):
        ApiKeys(["one", "two"]).tenant(bearer(text))


def test_a_call_without_metadata_is_refused():
    with pytest.raises(UnauthenticatedError):
        ApiKeys(["one"]).tenant(SimpleNamespace(invocation_metadata=lambda: None))


def test_without_keys_everybody_is_one_tenant():
    assert {ApiKeys([]).tenant(c) for c in (Context(), bearer("Bearer x"))} == {""}


def test_each_key_is_a_tenant_whose_name_does_not_show_it():
    keys = ApiKeys(["secret-one", "secret-two"])
    names = [keys.tenant(bearer(f"Bearer secret-{n}")) for n in ("one", "two", "one")]
    assert names[0] == names[2] != names[1]
    assert not any("secret" in name for name in names)


def test_the_admin_key_is_let_in_as_the_admin():
    keys = ApiKeys(["one"], "boss")
    assert keys.tenant(bearer("Bearer boss")) == ADMIN
    assert keys.tenant(bearer("Bearer one")).startswith("key-")
    alone = ApiKeys([], "boss")
    assert alone.tenant(bearer("Bearer boss")) == ADMIN
    for context in (Context(), bearer("Bearer "), bearer("Bearer one")):
        with pytest.raises(UnauthenticatedError):
            alone.tenant(context)


def test_a_key_has_the_same_name_in_every_run_whatever_the_other_keys():
    """Adapters on disk carry it; this value must not change."""
    expected = "key-cb1f81636632ca0a91bd9551aaa4df71"
    for keys in (["one"], ["two", "one"]):
        assert ApiKeys(keys, "boss").tenant(bearer("Bearer one")) == expected


def unary(method, parse=None):
    return grpc.unary_unary_rpc_method_handler(method, parse, None)


async def wrapped(handler, keys=(), method="/redmux.v1.X/Y"):
    async def continuation(details):
        return handler

    guard = Interceptor(ApiKeys(keys))
    return await guard.intercept_service(continuation, SimpleNamespace(method=method))


async def aborted(handler, context, request=b""):
    with pytest.raises(grpc.aio.AbortError):
        await handler.unary_unary(request, context)
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


async def test_a_request_without_the_key_is_not_told_that_it_is_malformed():
    def parse(data):
        raise ValueError

    async def method(request, context):
        raise AssertionError("a malformed request reached its method")

    handler = await wrapped(unary(method, parse), keys=["one"])
    request = handler.request_deserializer(b"\xff")
    assert (await aborted(handler, Context(), request))[0] is grpc.StatusCode.UNAUTHENTICATED
    code, _, metadata = await aborted(handler, bearer("Bearer one"), request)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert metadata["redmux-error"] == "InvalidArgumentError"


@pytest.mark.parametrize(
    ("method", "is_public"),
    [("/grpc.health.v1.Health/Check", True), ("/grpc.health.v1.HealthX/Check", False)],
)
async def test_health_alone_is_left_as_it_is(method, is_public):
    handler = failing(InvalidArgumentError("x"))
    assert (await wrapped(handler, ["one"], method) is handler) == is_public


async def test_a_stream_that_fails_has_written_what_came_before():
    async def method(request, context):
        yield "a"
        yield "b"
        raise NotFoundError("gone")

    handler = await wrapped(grpc.unary_stream_rpc_method_handler(method))
    context = Context()
    with pytest.raises(grpc.aio.AbortError):
        await handler.unary_stream(b"", context)
    assert context.written == ["a", "b"]
    assert context.aborted[0] is grpc.StatusCode.NOT_FOUND


async def test_a_stream_without_the_key_never_starts():
    started = []

    async def method(request, context):
        started.append(True)
        yield "a"

    handler = await wrapped(grpc.unary_stream_rpc_method_handler(method), keys=["one"])
    context = Context()
    with pytest.raises(grpc.aio.AbortError):
        await handler.unary_stream(b"", context)
    assert context.aborted[0] is grpc.StatusCode.UNAUTHENTICATED
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

    handler = await wrapped(grpc.unary_stream_rpc_method_handler(method))
    context = Gone()
    with caplog.at_level(logging.INFO), pytest.raises(asyncio.CancelledError):
        await handler.unary_stream(b"", context)
    assert (closed, context.aborted, caplog.text) == ([True], None, "")
