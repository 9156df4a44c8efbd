"""Engine with its thread: hand-overs, draining, stopping and dying."""

import asyncio
import logging
import threading

import pytest
from engine.fake_engine import Caller, make_adapter, make_parts

from redmux.errors import RequestCancelledError, UnavailableError
from redmux_server.engine.request import Failed, FinishReason, Token


class Gate:
    """Holds the engine thread inside forward until it is opened."""

    def __init__(self, parts):
        self.entered = asyncio.Event()
        self._opened = threading.Event()
        self._loop = asyncio.get_running_loop()
        parts.runner.before = self._wait

    def _wait(self, work):
        self._loop.call_soon_threadsafe(self.entered.set)
        assert self._opened.wait(20)

    def open(self):
        self._opened.set()


@pytest.fixture
async def parts():
    parts = make_parts()
    parts.engine.start()
    yield parts
    await parts.engine.stop()
    assert not parts.engine._thread.is_alive()


def submit(parts, *callers):
    for caller in callers:
        parts.engine.submit(caller.request)
    return callers


async def ended(*callers):
    async with asyncio.timeout(20):
        for caller in callers:
            await caller.ended.wait()


async def test_requests_are_served_and_end_on_the_event_loop(parts):
    threads = set()
    caller = Caller(max_tokens=4)
    take = caller.request.sink
    caller.request.sink = lambda event: (threads.add(threading.get_ident()), take(event))
    submit(parts, caller)
    await ended(caller)
    assert caller.tokens == [1, 2, 3, 0]
    assert caller.reason is FinishReason.LENGTH
    assert threads == {threading.get_ident()}


async def test_the_runner_enters_its_thread_once_before_the_first_step(parts):
    (caller,) = submit(parts, Caller())
    await ended(caller)
    assert parts.runner.entered == 1


async def test_many_requests_with_adapters_all_end_and_leave_nothing(parts):
    adapters = [None, *(make_adapter(i) for i in range(6))]
    callers = [Caller([i % 4], 1 + i % 5, adapter=adapters[i % 7]) for i in range(8)]
    submit(parts, *callers)
    await ended(*callers)
    for i, caller in enumerate(callers):
        assert caller.tokens == [(i + n) % 4 for n in range(1, 2 + i % 5)]
        assert caller.reason is FinishReason.LENGTH
    assert parts.is_idle


async def test_a_request_that_is_ended_in_mid_stream_leaves_the_engine(parts):
    caller, is_given_up = Caller(max_tokens=50), threading.Event()

    def take(event):
        caller.take(event)
        parts.engine.end(caller.request, Failed(RequestCancelledError("enough")))
        is_given_up.set()

    def wait_after_the_first(work):
        assert len(parts.runner.batches) == 1 or is_given_up.wait(20)

    caller.request.sink = take
    parts.runner.before = wait_after_the_first
    submit(parts, caller)
    await ended(caller)
    assert isinstance(caller.error, RequestCancelledError)
    assert 1 <= len(caller.tokens) <= 2
    assert parts.is_idle


async def test_draining_waits_for_the_open_requests(parts):
    gate = Gate(parts)
    (caller,) = submit(parts, Caller())
    await gate.entered.wait()
    drain = asyncio.create_task(parts.engine.drain(20))
    await asyncio.sleep(0)
    with pytest.raises(UnavailableError):
        submit(parts, Caller())
    assert not drain.done()
    gate.open()
    await drain
    assert caller.reason is FinishReason.LENGTH


async def test_draining_gives_up_after_its_time(parts):
    gate = Gate(parts)
    (caller,) = submit(parts, Caller())
    await parts.engine.drain(0.01)
    assert caller.endings == []
    gate.open()
    await ended(caller)


async def test_draining_can_be_cut_short(parts):
    gate = Gate(parts)
    (caller,) = submit(parts, Caller())
    drain = asyncio.create_task(parts.engine.drain(3600))
    await gate.entered.wait()
    parts.engine.cut_draining()
    async with asyncio.timeout(20):
        await drain
    assert caller.endings == []
    gate.open()
    await ended(caller)


async def test_stopping_fails_the_open_requests_as_unavailable(parts):
    gate = Gate(parts)
    running, other = submit(parts, Caller(max_tokens=50), Caller(max_tokens=50))
    await gate.entered.wait()
    (waiting,) = submit(parts, Caller())
    stop = asyncio.create_task(parts.engine.stop())
    await asyncio.sleep(0)
    gate.open()
    await stop
    for caller in (running, other, waiting):
        assert isinstance(caller.error, UnavailableError)
    assert parts.engine.num_open == 0


async def test_what_the_last_step_drew_arrives_before_the_end(parts):
    gate = Gate(parts)
    (caller,) = submit(parts, Caller(max_tokens=50))
    await gate.entered.wait()
    stop = asyncio.create_task(parts.engine.stop())
    await asyncio.sleep(0)
    gate.open()
    await stop
    assert caller.tokens == [1]
    assert isinstance(caller.events[0], Token)
    assert isinstance(caller.error, UnavailableError)


async def test_a_stopped_engine_refuses(parts):
    await parts.engine.stop()
    with pytest.raises(UnavailableError):
        submit(parts, Caller())


async def test_a_dead_engine_tells_every_open_request_and_refuses(parts, caplog):
    """An error outside the computation of a step: the engine's own state cannot be trusted."""

    def broken(*args):
        raise ZeroDivisionError

    gate = Gate(parts)
    callers = submit(parts, Caller(max_tokens=9), Caller(max_tokens=9))
    await gate.entered.wait()
    (waiting,) = submit(parts, Caller())
    parts.metrics.step = broken
    with caplog.at_level(logging.CRITICAL):
        gate.open()
        await ended(*callers, waiting)
    for caller in (*callers, waiting):
        assert isinstance(caller.error, UnavailableError)
    assert parts.engine.died.is_set()
    assert "ZeroDivisionError" in caplog.text
    with pytest.raises(UnavailableError):
        submit(parts, Caller())


async def test_an_engine_that_cannot_enter_its_thread_is_dead(caplog):
    parts = make_parts()
    parts.runner.enter_thread = lambda: 1 / 0
    (caller,) = submit(parts, Caller())
    with caplog.at_level(logging.CRITICAL):
        parts.engine.start()
        await ended(caller)
    assert parts.engine.died.is_set()
    assert isinstance(caller.error, UnavailableError)


async def test_a_dead_engine_counts_as_stuck(parts, caplog):
    assert not parts.engine.is_stuck(3600)
    parts.metrics.state = lambda *args: 1 / 0
    (caller,) = submit(parts, Caller())
    await ended(caller)
    parts.engine._thread.join(20)
    assert parts.engine.is_stuck(3600)


async def test_an_engine_is_stuck_only_while_requests_are_open(parts):
    gate = Gate(parts)
    assert not parts.engine.is_stuck(-1)
    (caller,) = submit(parts, Caller())
    await gate.entered.wait()
    assert parts.engine.is_stuck(-1)
    assert not parts.engine.is_stuck(3600)
    gate.open()
    await ended(caller)
    assert not parts.engine.is_stuck(-1)
