"""The interceptor under a real gRPC server: what a peer that sends or reads badly can do."""

import asyncio
import contextlib
import gc
import weakref

import grpc
import pytest

from redmux.errors import NotFoundError
from redmux_server.grpc_api.interceptor import Interceptor
from redmux_server.in_flight import CALL_BYTES, RECEIVING, InFlight
from redmux_server.keys import ApiKeys

MIB = 1 << 20
NO_PROBING = ("grpc.http2.bdp_probe", 0)
KEY = (("authorization", "Bearer one"),)
OTHER_KEY = (("authorization", "Bearer two"),)


@contextlib.asynccontextmanager
async def serving(*, unary=None, stream=None, parse=bytes, keys=(), in_flight=None, **options):
    """Yields a channel to a server whose methods are /x.Y/Unary and /x.Y/Stream, on bytes."""

    class Handlers(grpc.GenericRpcHandler):
        def service(self, details):
            if details.method.endswith("Unary"):
                return grpc.unary_unary_rpc_method_handler(unary, parse, bytes)
            return grpc.unary_stream_rpc_method_handler(stream, parse, bytes)

    guard = Interceptor(ApiKeys(keys), in_flight, **options)
    guard.set_limits({"/x.Y/Unary": MIB})
    server = grpc.aio.server(
        interceptors=[guard],
        options=[("grpc.max_receive_message_length", 16 * MIB), NO_PROBING],
    )
    server.add_generic_rpc_handlers((Handlers(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", [NO_PROBING]) as channel:
            yield channel
    finally:
        await server.stop(0)


async def status_of(call):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code()


async def read_all(call):
    with contextlib.suppress(grpc.aio.AioRpcError):
        while await call.read() is not grpc.aio.EOF:
            pass


async def until(condition):
    while not condition():
        await asyncio.sleep(0)


async def echo(request, context):
    return request


async def test_a_large_request_without_a_key_ends_before_it_was_sent():
    """The client would not send the rest of it: HTTP/2 lets it send no more than a window."""
    in_flight = InFlight()
    async with serving(unary=echo, keys=["one"], in_flight=in_flight) as channel:
        call = channel.unary_unary("/x.Y/Unary")
        codes = [await status_of(call(bytes(15 * MIB))) for _ in range(3)]
        assert await call(b"small", metadata=KEY) == b"small"
    assert codes == [grpc.StatusCode.UNAUTHENTICATED] * 3
    assert in_flight.num_bytes == 0


async def test_each_method_has_a_limit_of_its_own():
    async with serving(unary=echo) as channel:
        call = channel.unary_unary("/x.Y/Unary")
        assert len(await call(bytes(MIB))) == MIB
        assert await status_of(call(bytes(MIB + 1))) is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_unary_replies_that_nobody_reads_are_bounded():
    in_flight = InFlight(4 * MIB, 8 * MIB)
    num_answered = 0

    async def large(request, context):
        nonlocal num_answered
        num_answered += 1
        return bytes(MIB)

    async with serving(unary=large, in_flight=in_flight) as channel:
        # A client that asks for a stream takes no message, beyond a window of 64 KiB, until told.
        unread = [channel.unary_stream("/x.Y/Unary")(b"") for _ in range(20)]
        await until(lambda: num_answered == 20)
        await until(lambda: sum(call.done() for call in unread) == 17)
        assert 3 * MIB < in_flight.num_bytes < 4 * MIB
        refused = [call for call in unread if call.done()]
        assert {await call.code() for call in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        kept = next(call for call in unread if not call.done())
        assert len(await kept.read()) == MIB
        await until(lambda: in_flight.num_bytes < 3 * MIB)
        for call in unread:
            call.cancel()
        await until(lambda: in_flight.num_bytes == 0)


@pytest.mark.parametrize("num_read", [0, 1])
async def test_a_stream_that_is_dropped_for_not_reading_tells_its_client(num_read):
    closed = []

    async def many(request, context):
        try:
            while True:
                yield bytes(200_000)  # more than the client's window
        finally:
            closed.append(True)

    async with serving(stream=many, stall_s=0.05) as channel:
        call = channel.unary_stream("/x.Y/Stream")(b"")
        for _ in range(num_read):
            assert len(await call.read()) == 200_000
        await until(lambda: closed)
        await read_all(call)
        assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "did not read" in await call.details()


async def test_few_requests_of_a_caller_are_received_at_a_time():
    in_flight = InFlight()
    keys = ["one", "two"]
    async with serving(unary=echo, in_flight=in_flight, keys=keys, stall_s=1e6) as channel:
        open_call = channel.stream_unary("/x.Y/Unary")  # whose request does not come
        silent = [open_call(metadata=KEY) for _ in range(RECEIVING)]
        for call in silent:
            await call.wait_for_connection()
        await until(lambda: in_flight.num_bytes == RECEIVING * CALL_BYTES)
        call = channel.unary_unary("/x.Y/Unary")
        waiting = asyncio.ensure_future(call(b"x", metadata=KEY))
        await until(lambda: in_flight.num_bytes == (RECEIVING + 1) * CALL_BYTES)
        for _ in range(3):  # of another caller
            assert await call(b"y", metadata=OTHER_KEY) == b"y"
        assert not waiting.done()
        silent[0].cancel()
        assert await waiting == b"x"


async def test_a_call_that_its_client_cancels_gives_back_what_it_held(caplog):
    in_flight = InFlight()

    async def endless(request, context):
        await asyncio.Event().wait()

    async with serving(unary=endless, in_flight=in_flight) as channel:
        call = channel.unary_unary("/x.Y/Unary")(bytes(1000))
        await until(lambda: in_flight.num_bytes == CALL_BYTES + 1000)
        call.cancel()
        await until(lambda: in_flight.num_bytes == 0)
    assert caplog.text == ""


async def test_a_request_that_failed_is_let_go_at_once():
    """gRPC keeps what it raises in a cycle; collecting it takes a server minutes."""

    class Request:
        pass

    requests = []

    def parse(data):
        request = Request()
        requests.append(weakref.ref(request))
        return request

    async def failing(request, context):
        raise NotFoundError("not there")

    async def failing_stream(request, context):
        yield b"x"
        raise NotFoundError("not there")

    gc.collect()
    gc.disable()
    try:
        async with serving(unary=failing, stream=failing_stream, parse=parse) as channel:
            await status_of(channel.unary_unary("/x.Y/Unary")(b""))
            await read_all(channel.unary_stream("/x.Y/Stream")(b""))
            await until(lambda: all(request() is None for request in requests))
    finally:
        gc.enable()
    assert len(requests) == 2
