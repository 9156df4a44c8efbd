"""Servers whose engine fails, dies or hangs: what callers are told, and how the process ends."""

import asyncio
import signal

import grpc
import pytest
from e2e.test_process import Process
from grpc_health.v1 import health_pb2, health_pb2_grpc

from redmux import AbortedError, AsyncClient, RedmuxError, UnavailableError

# Runs `redmux serve` with an engine that does something else before it computes.
START = """
import sys, threading
from redmux_server import app, leaving
from redmux_server.engine import stepper

app._LOOK_S, app._STUCK_LOOKS, app._STEP_S, leaving._GRACE_S = 0.05, {looks}, 0.1, {grace_s}
draw = stepper.Stepper._draw

def broken(self, work):
    prompts = [item.request.prompt_ids for item in work]
    {what}
    return draw(self, work)

stepper.Stepper._draw = broken
sys.argv[0] = "redmux"
from redmux.cli import main
sys.exit(main(sys.argv[1:]))
"""
HANG = "print('hangs', file=sys.stderr, flush=True) or threading.Event().wait()"


@pytest.fixture
def serve(tiny_folder):
    def serve(what, *flags, looks=10**9, grace_s=1.0):
        code = START.format(what=what, looks=looks, grace_s=grace_s)
        return Process("--model", str(tiny_folder), *flags, start=("-c", code))

    return serve


async def outcome(call):
    try:
        await call
    except RedmuxError as err:
        return type(err)
    return None


async def read_until(server, text):
    while text not in (line := (await server.process.stderr.readline()).decode()):
        assert line, "".join(server.lines)
        server.lines.append(line)


async def read_to_the_end(call):
    while await call.read() is not grpc.aio.EOF:
        pass


async def test_a_model_that_fails_every_step_ends_the_process_for_a_restart(serve):
    async with serve("raise RuntimeError('CUDA error: an illegal memory access')") as server:
        async with AsyncClient(await server.ready()) as client:
            calls = [outcome(client.generate("abc", max_tokens=4)) for _ in range(3)]
            assert {RedmuxError} <= set(await asyncio.gather(*calls)) <= {RedmuxError, AbortedError}
        code, text = await server.ended()
    assert code == 70
    assert "illegal memory access" in text


async def test_requests_that_fail_beside_a_sound_model_end_nothing(serve):
    poison = "if any(len(p) > 4 for p in prompts): raise RuntimeError('long')"
    async with serve(poison) as server:
        async with AsyncClient(await server.ready()) as client:
            for _ in range(7):
                assert await outcome(client.generate("too long", max_tokens=4)) is RedmuxError
            await client.generate("abc", max_tokens=4)
            assert await client.health() == "serving"
        server.process.send_signal(signal.SIGTERM)
        code, _ = await server.ended()
    assert code == 0


async def test_a_hung_step_fails_open_requests_and_the_server_stops_serving(serve):
    async with serve(HANG, "--max-running", "1", looks=3) as server:
        async with AsyncClient(await server.ready()) as client:
            running = asyncio.create_task(outcome(client.generate("abc", timeout_s=60)))
            await read_until(server, "hangs")
            assert await running is AbortedError
            assert await client.health() == "not_serving"
            with pytest.raises(UnavailableError, match="does not end"):
                await client.generate("abc")
        server.process.send_signal(signal.SIGTERM)
        code, _ = await server.ended()
    assert code == 70


async def test_sigterm_ends_a_process_whose_step_hangs(serve):
    async with serve(HANG, "--drain-s", "0", "--max-running", "1") as server:
        async with AsyncClient(await server.ready()) as client:
            running = asyncio.create_task(outcome(client.generate("abc", timeout_s=60)))
            await read_until(server, "hangs")
            server.process.send_signal(signal.SIGTERM)
            assert await running is AbortedError
        code, _ = await server.ended()
    assert code == 70


@pytest.mark.slow
async def test_a_second_sigterm_ends_a_process_whose_step_hangs_without_draining(serve):
    async with serve(HANG, "--drain-s", "3600") as server:
        async with AsyncClient(await server.ready()) as client:
            running = asyncio.create_task(outcome(client.generate("abc", timeout_s=60)))
            await read_until(server, "hangs")
            server.process.send_signal(signal.SIGTERM)
            await read_until(server, "draining")
            server.process.send_signal(signal.SIGTERM)
            assert await running in (AbortedError, UnavailableError)
        code, _ = await server.ended()
    assert code == 70


async def test_sigterm_ends_a_process_whose_event_loop_hangs(serve):
    block = (
        "from redmux_server.services.generation import GenerationService; "
        f"GenerationService.submit = lambda *args: {HANG}"
    )
    async with (
        serve(block, "--drain-s", "0") as server,
        AsyncClient(await server.ready()) as client,
    ):
        await client.generate("abc", max_tokens=1)
        hung = asyncio.create_task(outcome(client.generate("abc", timeout_s=60)))
        await read_until(server, "hangs")
        server.process.send_signal(signal.SIGTERM)
        code, text = await server.ended()
        assert await hung is UnavailableError
    assert code == 70
    assert "this is what hangs" in text


async def test_when_the_engine_dies_nobody_is_told_that_they_cancelled(serve):
    dying = "if any(len(p) > 4 for p in prompts): stepper.time = None"
    async with serve(dying, "--max-running", "4") as server:
        async with AsyncClient(await server.ready()) as client:
            prompts = ["abc", "abc", "the end", *["abc"] * 37]
            outcomes = await asyncio.gather(
                *(outcome(client.generate(p, max_tokens=200, ignore_eos=True)) for p in prompts)
            )
        code, _ = await server.ended()
    assert code == 70
    assert outcomes[2] is AbortedError
    assert UnavailableError in outcomes
    assert set(outcomes) <= {None, AbortedError, UnavailableError}


@pytest.mark.slow
async def test_calls_that_a_stopping_server_gives_up_are_unavailable(serve):
    """A text that is being tokenized for longer than the server drains, and a health watch."""
    slow = (
        f"from redmux_server.models.text import TextCodec; TextCodec.encode = lambda *args: {HANG}"
    )
    async with serve(slow, "--drain-s", "0", grace_s=60) as server:
        target = await server.ready()
        async with AsyncClient(target) as client, grpc.aio.insecure_channel(target) as channel:
            await client.generate("abc", max_tokens=1)
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            await watch.read()
            tokenized = asyncio.create_task(outcome(client.generate("abc", timeout_s=60)))
            await read_until(server, "hangs")
            server.process.send_signal(signal.SIGTERM)
            assert await tokenized is UnavailableError
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await read_to_the_end(watch)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        code, _ = await server.ended()
    assert code == 0
