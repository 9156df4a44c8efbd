import asyncio
import time

from redmux import Chunk, ResourceExhaustedError
from redmux_bench.load import LoadGenerator
from redmux_bench.workload import Planned


def chunk(*token_ids):
    return Chunk("", token_ids, None, None, None, None, None, None)


class FakeClient:
    """Streams two messages for each request; keeps what was asked for and how many were open."""

    def __init__(self, fail=lambda prompt: False):
        self.fail = fail
        self.asked = []
        self.num_open = 0
        self.most_open = 0

    async def stream(self, prompt, **options):
        self.asked.append((prompt, options))
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        try:
            await asyncio.sleep(0)
            yield chunk(1)
            if self.fail(prompt):
                raise ResourceExhaustedError("full")
            yield chunk(2, 3)
        finally:
            self.num_open -= 1


def planned(count, due_s=None):
    return [Planned((i,), 3, None if i % 2 else "a", due_s) for i in range(count)]


async def test_a_closed_loop_keeps_as_many_requests_open_as_it_was_told():
    client = FakeClient()
    wave = await LoadGenerator(client).run(planned(20), concurrency=3)
    assert client.most_open == 3
    assert sorted(prompt for prompt, _ in client.asked) == [(i,) for i in range(20)]
    assert len(wave.calls) == 20


async def test_requests_with_a_time_are_sent_then_however_many_are_open():
    client = FakeClient()
    started_s = time.perf_counter()
    wave = await LoadGenerator(client).run(planned(9, due_s=0.02), concurrency=1)
    assert time.perf_counter() - started_s >= 0.02
    assert client.most_open == 9
    assert {call.started_s for call in wave.calls} == {0.02}


async def test_every_token_of_a_message_has_the_time_of_the_message():
    wave = await LoadGenerator(FakeClient()).run(planned(1), concurrency=1)
    (call,) = wave.calls
    first, second, third = call.token_times_s
    assert call.started_s <= first <= second == third <= call.ended_s <= wave.duration_s


async def test_a_failing_request_is_kept_with_its_error_and_stops_no_other():
    client = FakeClient(fail=lambda prompt: prompt[0] in (0, 3))
    wave = await LoadGenerator(client).run(planned(8), concurrency=2)
    errors = [call.error for call in wave.calls if call.error is not None]
    assert [error.message for error in errors] == ["full", "full"]
    assert len(wave.calls) == 8


async def test_what_was_planned_is_what_is_asked_for():
    client = FakeClient()
    await LoadGenerator(client, ignore_eos=False, timeout_s=9.0).run(planned(2), concurrency=1)
    common = {"max_tokens": 3, "ignore_eos": False, "timeout_s": 9.0}
    assert client.asked == [((0,), {"adapter": "a", **common}), ((1,), {"adapter": None, **common})]


async def test_progress_is_told_whenever_a_request_ends():
    told = []
    client = FakeClient(fail=lambda prompt: True)
    await LoadGenerator(client).run(planned(5), 1, lambda: told.append(client.num_open))
    assert told == [0] * 5
