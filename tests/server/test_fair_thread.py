"""FairThread: whose turn it is, and that nobody waits for it at the end."""

import asyncio
import threading

import pytest

from redmux.errors import InvalidArgumentError, UnavailableError
from redmux_server.fair_thread import FairThread, portions


@pytest.fixture
async def thread():
    thread = FairThread("test")
    yield thread
    thread.close()


class Gate:
    """Holds the thread up, and tells in which order it did what was asked of it meanwhile."""

    def __init__(self, thread):
        self.thread = thread
        self.opens, self.is_held = threading.Event(), threading.Event()
        self.order = []
        self.tasks = []

    async def hold(self, tenant="first", cost=0):
        def wait():
            self.is_held.set()
            self.opens.wait()

        self.ask(tenant, cost, wait)
        while not self.is_held.is_set():
            await asyncio.sleep(0)

    def ask(self, tenant, cost, work=None):
        work = work or (lambda: self.order.append(tenant))
        self.tasks.append(asyncio.ensure_future(self.thread.run(tenant, cost, work)))

    async def release(self):
        await asyncio.sleep(0)  # the last of those asked for is in the queue
        self.opens.set()
        await asyncio.gather(*self.tasks)
        return self.order


async def test_results_and_errors_come_back_from_another_thread(thread):
    def refuse():
        raise InvalidArgumentError("no")

    assert await thread.run("a", 1, threading.current_thread) is not threading.current_thread()
    with pytest.raises(InvalidArgumentError, match="no"):
        await thread.run("a", 1, refuse)
    assert await thread.run("a", 1, lambda: 3) == 3


async def test_a_tenant_that_asks_for_little_does_not_wait_for_one_that_asks_for_much(thread):
    gate = Gate(thread)
    await gate.hold("much", 1000)
    for _ in range(20):
        gate.ask("much", 1000)
    await asyncio.sleep(0)
    for _ in range(5):
        gate.ask("little", 10)
    order = await gate.release()
    assert order.index("little") <= 1
    assert order[:7].count("little") == 5


async def test_new_tenants_do_not_starve_one_that_was_served_before(thread):
    gate = Gate(thread)
    await gate.hold("old", 100)
    gate.ask("old", 100)
    for number in range(300):
        gate.ask(f"new{number}", 1)
    order = await gate.release()
    assert order.index("old") <= 100


async def test_counters_are_kept_for_those_alone_to_whom_they_matter(thread):
    for number in range(1000):
        await thread.run(f"tenant{number}", 1, lambda: None)
    assert len(thread._served) < 100


async def test_what_its_caller_gave_up_is_not_done(thread):
    gate = Gate(thread)
    await gate.hold()
    gate.ask("a", 1)
    gate.ask("b", 1)
    await asyncio.sleep(0)
    gate.tasks.pop(1).cancel()
    assert await gate.release() == ["b"]


async def test_closing_waits_for_nothing(thread):
    gate = Gate(thread)
    await gate.hold()
    gate.ask("a", 1)
    await asyncio.sleep(0)
    thread.close()
    for task in gate.tasks:  # the one that goes on, too
        with pytest.raises(UnavailableError, match="shutting down"):
            await task
    with pytest.raises(UnavailableError):
        await thread.run("a", 1, lambda: None)
    thread.close()
    gate.opens.set()
    assert gate.order == []


async def test_the_end_of_the_process_does_not_wait_for_it(thread):
    gate = Gate(thread)
    await gate.hold()
    (running,) = [t for t in threading.enumerate() if t.name == "test"]
    assert running.daemon  # the interpreter joins all others
    await gate.release()


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([], []),
        ([1], [[1]]),
        ([10] * 5, [[10] * 5]),
        ([20_000, 20_000, 1], [[20_000], [20_000, 1]]),
        ([90_000, 1, 90_000, 90_000], [[90_000], [1], [90_000], [90_000]]),
    ],
)
def test_portions_are_short_or_one_text(lengths, expected):
    assert list(portions(lengths, int)) == expected
