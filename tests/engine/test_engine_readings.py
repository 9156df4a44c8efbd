"""Requests that are read: one ending, whole or in chunks, beside generations, all or none."""

import pytest
from engine.fake_engine import NAN, POISON, Caller, make_parts

from redmux import (
    FailedPreconditionError,
    RedmuxError,
    RequestCancelledError,
    ResourceExhaustedError,
)
from redmux_server.engine.request import Failed, Pooling, Read, Reading


def reader(prompt, pooling=Pooling.MEAN, normalize=False, **options):
    return Caller(prompt, max_tokens=0, reading=Reading(pooling, normalize), **options)


def values(caller):
    (event,) = caller.events
    assert isinstance(event, Read)
    return event.values


def run(parts, *callers):
    if callers:
        parts.engine.submit(*(caller.request for caller in callers))
    while not parts.is_idle or parts.engine.num_open:
        parts.step()


@pytest.mark.parametrize(
    ("pooling", "normalize", "expected"),
    [
        (Pooling.MEAN, False, 2.0),
        (Pooling.CLS, False, 1.0),
        (Pooling.LAST, False, 3.0),
        (Pooling.LAST, True, 3**-0.5),
    ],
)
def test_the_states_of_all_chunks_are_pooled(pooling, normalize, expected):
    """18 tokens in steps of 8: the first is 1, the last 3, the mean 2."""
    parts, caller = make_parts(), reader([1] + [2] * 16 + [3], pooling, normalize)
    run(parts, caller)
    assert len(parts.runner.batches) == 3
    assert values(caller) == pytest.approx([expected] * 3)
    assert not caller.request.states  # its caller may wait for a thousand others


def test_a_reading_and_a_generation_share_a_step():
    parts, one, other = make_parts(), reader([1, 3]), Caller([0], max_tokens=2)
    run(parts, one, other)
    assert values(one) == [2.0] * 3
    assert other.tokens == [1, 2]


def test_a_reading_does_not_start_behind_cached_blocks():
    parts = make_parts()
    prompt = [1, 2, 3, 1, 2, 3, 1, 2, 3]
    run(parts, Caller(prompt, max_tokens=1))
    caller = reader(prompt)
    run(parts, caller)
    assert caller.request.num_cached == 0
    assert values(caller) == [2.0] * 3


def test_whole_prompts_wait_for_a_step_that_takes_them():
    parts = make_parts(prefix_cache=False, whole_prompts=True)
    callers = [reader([2] * n) for n in (5, 4, 3, 8)]
    run(parts, *callers)
    assert [[len(r.prompt_ids) for r in batch] for batch in parts.runner.batches] == [
        [5], [4, 3], [8],
    ]  # fmt: skip
    assert all(values(caller) == [2.0] * 3 for caller in callers)


def test_tenants_take_turns_with_whole_prompts():
    parts = make_parts(prefix_cache=False, whole_prompts=True, max_running=1)
    callers = [reader([2] * 3, tenant=tenant) for tenant in "aaab"]
    run(parts, *callers)
    assert [batch[0].tenant for batch in parts.runner.batches] == ["a", "b", "a", "a"]


def test_values_that_are_not_finite_fail_their_own_request_only():
    parts, wild, fine = make_parts(), reader([1, NAN]), reader([1, 3])
    run(parts, wild, fine)
    assert isinstance(wild.error, FailedPreconditionError)
    assert values(fine) == [2.0] * 3


def test_a_step_that_fails_is_run_again_one_by_one():
    parts, culprit, fine, other = make_parts(), reader([POISON]), reader([1, 3]), Caller([0])
    run(parts, culprit, fine, other)
    assert type(culprit.error) is RedmuxError
    assert "secret" not in culprit.error.message
    assert values(fine) == [2.0] * 3
    assert other.tokens == [1, 2, 3]


def test_several_requests_are_accepted_together_or_not_at_all():
    parts = make_parts(max_open=4)
    first, second = [reader([1]) for _ in range(2)], [reader([1]) for _ in range(2)]
    parts.engine.submit(*(caller.request for caller in first))
    with pytest.raises(ResourceExhaustedError, match="2 requests of it are open"):
        parts.engine.submit(*(caller.request for caller in second))
    assert parts.engine.num_open == 2
    run(parts)
    assert [values(caller) for caller in first] == [[1.0] * 3] * 2
    assert [caller.events for caller in second] == [[], []]


def test_a_reading_that_is_given_up_half_way_leaves_nothing_behind():
    parts, caller = make_parts(), reader([1] * 18)
    parts.engine.submit(caller.request)
    parts.step()
    parts.engine.end(caller.request, Failed(RequestCancelledError("gone")))
    parts.step()
    assert isinstance(caller.error, RequestCancelledError)
    assert parts.is_idle
