"""Engine with its thread: hand-overs, draining, stopping and dying."""

import asyncio
import logging
import threading

import pytest
from engine.fake_engine import Caller, make_adapter, make_parts

from redmux.errors import AbortedError, RequestCancelledError, UnavailableError
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
    for caller in callers:
        assert isinstance(caller.error, AbortedError)
    assert isinstance(waiting.error, UnavailableError)
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


async def test_what_a_dying_engine_has_computed_arrives_before_the_end(parts, caplog):
    """Its last step was computed; it died while it counted."""

    def break_at_the_third(work):
        if len(parts.runner.batches) == 3:
            parts.metrics.step = lambda *args: 1 / 0

    parts.runner.before = break_at_the_third
    short, long = submit(parts, Caller(max_tokens=3), Caller(max_tokens=9))
    await ended(short, long)
    assert (short.tokens, short.reason) == ([1, 2, 3], FinishReason.LENGTH)
    assert long.tokens == [1, 2, 3]
    assert isinstance(long.error, AbortedError)


async def test_an_engine_whose_thread_is_told_to_exit_is_dead(parts, caplog):
    def leave(work):
        raise SystemExit

    parts.runner.before = leave
    (caller,) = submit(parts, Caller())
    await ended(caller)
    assert isinstance(caller.error, AbortedError)
    assert parts.engine.died.is_set()


async def test_an_engine_whose_events_cannot_be_delivered_is_dead(parts, caplog):
    parts.metrics.first_token_s = None
    (caller,) = submit(parts, Caller(max_tokens=50))
    async with asyncio.timeout(20):
        await parts.engine.died.wait()
    await parts.engine.stop()
    assert isinstance(caller.error, UnavailableError)


async def test_a_dead_engine_is_not_alive(parts, caplog):
    assert parts.engine.is_alive
    parts.metrics.state = lambda *args: 1 / 0
    (caller,) = submit(parts, Caller())
    await ended(caller)
    parts.engine._thread.join(20)
    assert not parts.engine.is_alive


async def test_an_engine_says_which_step_is_under_way(parts):
    gate = Gate(parts)
    (caller,) = submit(parts, Caller(max_tokens=1))
    await gate.entered.wait()
    step = parts.engine.step_under_way
    assert step is not None
    assert parts.engine.step_under_way == step
    gate.open()
    await ended(caller)
    while parts.engine.step_under_way is not None:  # until it waits for the next request
        await asyncio.sleep(0)


async def test_a_step_that_is_given_up_fails_who_is_in_it_and_who_waits(parts):
    gate = Gate(parts)
    (running,) = submit(parts, Caller(max_tokens=50))
    await gate.entered.wait()
    (waiting,) = submit(parts, Caller())
    parts.engine.give_up_step()
    assert isinstance(running.error, AbortedError)
    assert isinstance(waiting.error, UnavailableError)
    with pytest.raises(UnavailableError, match="does not end"):
        submit(parts, Caller())
    gate.open()


async def test_an_engine_works_again_once_a_step_that_was_given_up_has_ended(parts):
    gate = Gate(parts)
    (gone,) = submit(parts, Caller(max_tokens=50))
    await gate.entered.wait()
    step = parts.engine.step_under_way
    parts.engine.give_up_step()
    gate.open()
    while parts.engine.step_under_way == step:
        await asyncio.sleep(0)
    (caller,) = submit(parts, Caller())
    await ended(caller)
    assert caller.tokens == [1, 2, 3]
    assert (gone.tokens, len(gone.endings)) == ([], 1)
    assert parts.is_idle


async def test_a_step_that_does_not_end_holds_up_no_stop():
    parts = make_parts()
    parts.engine.start()
    gate = Gate(parts)
    (running,) = submit(parts, Caller(max_tokens=50))
    await gate.entered.wait()
    (waiting,) = submit(parts, Caller())
    await parts.engine.stop(0.01)
    assert parts.engine.is_alive
    assert isinstance(running.error, AbortedError)
    assert isinstance(waiting.error, UnavailableError)
    gate.open()
    await parts.engine.stop()
    assert not parts.engine.is_alive
