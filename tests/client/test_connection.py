import asyncio
import os
import subprocess
import sys
import threading

import grpc
import pytest
from grpc import StatusCode

import redmux


def unavailable(times, pushback_ms=None):
    """Refuses the first attempts."""
    left = [times]

    def fail(call, context):
        if left[0] > 0:
            left[0] -= 1
            if pushback_ms is not None:
                context.set_trailing_metadata([("grpc-retry-pushback-ms", pushback_ms)])
            context.abort(StatusCode.UNAVAILABLE, "starting")

    return fail


def test_an_unavailable_server_is_tried_again(client, server):
    server.fail = unavailable(times=2)
    assert client.generate("Hi").text == "Hello world"
    assert len(server.calls) == 3


def test_a_stream_is_tried_again_before_its_first_message(client, server):
    server.fail = unavailable(times=2)
    assert "".join(chunk.text for chunk in client.stream("Hi")) == "Hello world"
    assert len(server.calls) == 3


def test_adapters_and_info_are_tried_again(client, server):
    server.fail = unavailable(times=1)
    client.info()
    server.fail = unavailable(times=1)
    client.adapters.put("a", b"")
    methods = [call.method for call in server.calls]
    assert methods == ["GetServerInfo", "GetServerInfo", "PutAdapter", "PutAdapter"]


def test_retries_end_after_four_attempts(client, server):
    server.fail = unavailable(times=100, pushback_ms="1")
    with pytest.raises(redmux.UnavailableError, match="starting"):
        client.generate("Hi")
    assert len(server.calls) == 4


def test_a_server_can_forbid_retries(client, server):
    server.fail = unavailable(times=100, pushback_ms="-1")
    with pytest.raises(redmux.UnavailableError):
        client.generate("Hi")
    assert len(server.calls) == 1


def test_a_stream_is_not_tried_again_after_its_first_message(client, server):
    context_of_call = []
    server.fail = lambda call, context: context_of_call.append(context)

    def script(generation, call):
        yield from server.first_message(generation, call)
        context_of_call[-1].abort(StatusCode.UNAVAILABLE, "draining")

    server.script = script
    chunks = client.stream("Hi")
    assert next(chunks).text == "Hello"
    with pytest.raises(redmux.UnavailableError, match="draining"):
        next(chunks)
    assert len(server.calls) == 1


@pytest.mark.parametrize("code", [StatusCode.INTERNAL, StatusCode.RESOURCE_EXHAUSTED])
def test_other_errors_are_not_tried_again(client, server, code):
    server.fail = lambda call, context: context.abort(code, "no")
    with pytest.raises(redmux.RedmuxError):
        client.generate("Hi")
    assert len(server.calls) == 1


def test_the_api_key_goes_with_every_call(connect, target, server):
    client = connect(target, api_key="s3cret")
    client.generate("Hi")
    list(client.stream("Hi"))
    client.info()
    client.adapters.put("a", b"")
    list(client.adapters.list())
    client.adapters.get("a")
    client.adapters.delete("a")
    assert [call.metadata.get("authorization") for call in server.calls] == ["Bearer s3cret"] * 7


def test_no_api_key_sends_no_header(client, server):
    client.info()
    assert "authorization" not in server.calls[0].metadata


def test_tls_trusts_the_given_authority(connect, tls_target, authority, server):
    pem = authority.cert_pem.bytes()
    client = connect(tls_target, tls=True, root_certificates=pem, api_key="s3cret")
    assert client.generate("Hi").text == "Hello world"
    assert server.calls[0].metadata["authorization"] == "Bearer s3cret"


def test_tls_takes_credentials(connect, tls_target, authority):
    credentials = grpc.ssl_channel_credentials(authority.cert_pem.bytes())
    assert connect(tls_target, tls=credentials).generate("Hi").text == "Hello world"


@pytest.mark.parametrize(
    "options",
    [
        {"target": ""},
        {"target": None},
        {"api_key": ""},
        {"api_key": "two\nlines"},
        {"api_key": "schl\u00fcssel"},
        {"root_certificates": b"-----BEGIN CERTIFICATE-----"},
        {"root_certificates": b"pem", "tls": True},
        {"root_certificates": "-----BEGIN CERTIFICATE-----", "tls": True},
        {"tls": "ca.pem"},
        {"api_key": 3},
        {"timeout_s": 0},
        {"timeout_s": None},
    ],
    ids=repr,
)
def test_settings_are_checked_when_the_client_is_made(connect, options):
    with pytest.raises(redmux.InvalidArgumentError):
        connect(**{"target": "localhost:1", **options})


def test_responses_may_be_larger_than_grpcs_default_of_4_mib(client, server):
    server.info.model = "x" * (6 << 20)
    assert len(client.info().model) == 6 << 20


def test_a_closed_client_says_so(connect, target, server):
    client = connect(target)
    client.info()
    client.close()
    client.close()
    # Only `info` has been called before: gRPC must not meet the other methods on a dead channel.
    for call in (
        client.info,
        client.health,
        lambda: client.generate("Hi"),
        lambda: next(client.stream("Hi")),
        lambda: client.adapters.get("a"),
    ):
        with pytest.raises(redmux.FailedPreconditionError, match="closed"):
            call()
    assert len(server.calls) == 1


USE_AFTER_CLOSE = """
import asyncio, sys, redmux

async def main():
    client = redmux.AsyncClient(sys.argv[1])
    await client.info()
    await client.close()
    try:
        await client.generate("Hi")
    except redmux.FailedPreconditionError:
        pass

for _ in range(20):
    asyncio.run(main())
"""


def test_a_method_first_used_after_close_touches_no_freed_memory(target):
    # glibc overwrites what is freed, so that gRPC's use of a destroyed channel ends the process.
    done = subprocess.run(
        [sys.executable, "-c", USE_AFTER_CLOSE, target],
        env={**os.environ, "MALLOC_PERTURB_": "165"},
        timeout=60,
    )
    assert done.returncode == 0


def test_a_client_closed_before_its_first_call_says_so(connect, target):
    client = connect(target)
    client.close()
    with pytest.raises(redmux.FailedPreconditionError, match="closed"):
        client.info()


def test_leaving_a_with_block_closes(target):
    with redmux.Client(target) as client:
        client.info()
    with pytest.raises(redmux.FailedPreconditionError):
        client.info()


async def test_leaving_an_async_with_block_closes(target):
    async with redmux.AsyncClient(target) as client:
        await client.info()
    with pytest.raises(redmux.FailedPreconditionError):
        await client.info()


def signal_first_message(server):
    """Makes the server answer once and stay silent; returns what is set when it has a call."""
    has_call = threading.Event()

    def fail(call, context):
        has_call.set()

    server.fail = fail
    server.script = server.first_then_silence
    return has_call


def test_close_ends_running_calls(target, server):
    has_call = signal_first_message(server)
    client = redmux.Client(target)
    errors = []

    def generate():
        try:
            client.generate("Hi")
        except redmux.RedmuxError as error:
            errors.append(error)

    thread = threading.Thread(target=generate)
    thread.start()
    assert has_call.wait(10)
    client.close()
    thread.join(10)
    assert [type(error) for error in errors] == [redmux.RequestCancelledError]


async def test_close_ends_running_calls_of_other_tasks(target, server):
    has_call = signal_first_message(server)
    client = redmux.AsyncClient(target)
    task = asyncio.create_task(client.generate("Hi"))
    stream = client.stream("Hi")
    await anext(stream)
    rest = asyncio.create_task(anext(stream))
    assert await asyncio.to_thread(has_call.wait, 10)
    await client.close()
    with pytest.raises(redmux.RequestCancelledError):
        await task
    with pytest.raises(redmux.RequestCancelledError):
        await rest


async def test_cancelling_a_task_cancels_its_request(target, server):
    has_call = signal_first_message(server)
    async with redmux.AsyncClient(target) as client:
        task = asyncio.create_task(client.generate("Hi"))
        assert await asyncio.to_thread(has_call.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(server.calls[0].has_ended.wait, 10)


async def test_a_cancelled_task_stays_cancelled_when_its_client_is_closed(target, server):
    has_call = signal_first_message(server)
    client = redmux.AsyncClient(target)
    task = asyncio.create_task(client.generate("Hi"))
    assert await asyncio.to_thread(has_call.wait, 10)
    task.cancel()
    await client.close()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_requests_of_one_client_run_at_the_same_time(target, server):
    both = threading.Barrier(2)

    def script(generation, call):
        both.wait(10)
        return server.two_messages(generation, call)

    server.script = script
    async with redmux.AsyncClient(target) as client:
        completions = await asyncio.gather(client.generate("a"), client.generate("b"))
    assert [completion.text for completion in completions] == ["Hello world"] * 2
