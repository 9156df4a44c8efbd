"""Engine, stepped by hand: what becomes of each request, without threads and without a model."""

import logging
import time

import pytest
from engine.fake_engine import NAN, POISON, Caller, make_adapter, make_parts, run
from hypothesis import given, settings
from hypothesis import strategies as st

from redmux.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    RedmuxError,
    RequestCancelledError,
    ResourceExhaustedError,
    UnavailableError,
)
from redmux_server.engine.request import Failed, Finished, FinishReason, SamplingParams


def submit(parts, *callers):
    for caller in callers:
        parts.engine.submit(caller.request)
    return callers


def cancel(parts, caller):
    parts.engine.end(caller.request, Failed(RequestCancelledError("gone")))


def test_a_request_gets_its_tokens_and_then_its_ending():
    parts = make_parts()
    (caller,) = submit(parts, Caller([0, 1], max_tokens=5))
    run(parts)
    assert caller.tokens == [2, 3, 0, 1, 2]
    assert caller.reason is FinishReason.LENGTH
    assert parts.is_idle


def test_a_stop_token_ends_a_request():
    parts = make_parts()
    (caller,) = submit(parts, Caller([0], max_tokens=9, stop_token_ids=frozenset({2})))
    run(parts)
    assert caller.tokens == [1, 2]
    assert caller.reason is FinishReason.STOP


def test_the_request_that_exceeds_its_share_is_refused_and_says_when_to_come_back():
    parts = make_parts(max_open=3)
    submit(parts, Caller(), Caller())
    with pytest.raises(ResourceExhaustedError, match="is full: 2 requests of it are open") as got:
        submit(parts, Caller())
    assert got.value.retry_after_s > 0
    assert parts.engine.num_open == 2


def test_an_ended_request_makes_room_for_another():
    parts = make_parts(max_open=1)
    submit(parts, Caller(max_tokens=1))
    parts.step()
    (caller,) = submit(parts, Caller(max_tokens=1))
    run(parts)
    assert caller.reason is FinishReason.LENGTH


def test_a_failing_forward_fails_its_own_request_only(caplog):
    parts = make_parts()
    good, bad, other = submit(parts, Caller([0]), Caller([POISON]), Caller([2]))
    with caplog.at_level(logging.ERROR):
        run(parts)
    assert type(bad.error) is RedmuxError
    assert bad.tokens == []
    assert (good.tokens, other.tokens) == ([1, 2, 3], [3, 0, 1])
    assert good.reason is other.reason is FinishReason.LENGTH
    assert parts.is_idle


def test_the_text_of_an_internal_error_is_logged_and_not_told(caplog):
    parts = make_parts()
    (bad,) = submit(parts, Caller([POISON]))
    with caplog.at_level(logging.ERROR):
        run(parts)
    assert "a secret of the kernel" in caplog.text
    assert "secret" not in bad.error.message


def test_a_request_that_joins_a_running_batch_and_fails_leaves_it_alone(caplog):
    parts = make_parts()
    (good,) = submit(parts, Caller([0, 1], max_tokens=6))
    parts.step()
    parts.step()
    (bad,) = submit(parts, Caller([POISON, 1, 2], adapter=make_adapter()))
    run(parts)
    assert good.tokens == [2, 3, 0, 1, 2, 3]
    assert isinstance(bad.error, RedmuxError)
    assert parts.is_idle


def test_a_row_that_is_not_finite_fails_its_own_request_only():
    parts = make_parts()
    adapter = make_adapter()
    good, bad, base = submit(parts, Caller([0]), Caller([NAN], adapter=adapter), Caller([1, NAN]))
    run(parts)
    assert good.tokens == [1, 2, 3]
    assert isinstance(bad.error, FailedPreconditionError)
    assert adapter.digest in bad.error.message
    assert "the base model produced" in base.error.message
    assert bad.tokens == base.tokens == []
    assert parts.is_idle


def test_a_sampled_row_that_is_not_finite_fails_too():
    parts = make_parts()
    (bad,) = submit(parts, Caller([NAN], sampling=SamplingParams(temperature=1.0), logprobs=True))
    run(parts)
    assert isinstance(bad.error, FailedPreconditionError)


def test_a_cancelled_request_ends_at_the_next_step_and_gives_everything_back():
    parts = make_parts()
    (caller,) = submit(parts, Caller([0, 1], max_tokens=20, adapter=make_adapter()))
    parts.step()
    assert not parts.is_idle
    cancel(parts, caller)
    parts.step()
    assert isinstance(caller.error, RequestCancelledError)
    assert caller.tokens == [2]
    assert parts.is_idle
    assert len(parts.runner.batches) == 1


def test_a_request_cancelled_while_it_waits_is_never_computed():
    parts = make_parts(max_running=1)
    first, second = submit(parts, Caller([0], max_tokens=4), Caller([2]))
    parts.step()
    cancel(parts, second)
    run(parts)
    assert isinstance(second.error, RequestCancelledError)
    assert first.reason is FinishReason.LENGTH
    assert all(second.request not in batch for batch in parts.runner.batches)
    assert parts.is_idle


def test_a_request_cancelled_before_its_first_step_is_never_computed():
    parts = make_parts()
    (caller,) = submit(parts, Caller())
    cancel(parts, caller)
    run(parts)
    assert isinstance(caller.error, RequestCancelledError)
    assert parts.runner.batches == []


def test_cancelling_an_ended_request_is_harmless():
    parts = make_parts()
    (caller,) = submit(parts, Caller(max_tokens=1))
    run(parts)
    cancel(parts, caller)
    parts.step()
    assert caller.reason is FinishReason.LENGTH


def test_a_reader_that_has_enough_ends_a_request_as_finished():
    parts = make_parts()
    (caller,) = submit(parts, Caller(max_tokens=9))
    parts.step()
    parts.engine.end(caller.request, Finished(FinishReason.STOP))
    cancel(parts, caller)  # what comes first counts
    parts.step()
    assert caller.reason is FinishReason.STOP
    assert caller.tokens == [1]
    assert parts.is_idle


def test_a_request_cancelled_inside_a_step_ends_once():
    parts = make_parts()
    (caller,) = submit(parts, Caller(max_tokens=1))
    parts.runner.before = lambda work: cancel(parts, caller)
    run(parts)
    parts.step()
    assert caller.reason is FinishReason.LENGTH


def test_an_adapter_is_given_back_when_its_request_ends():
    parts = make_parts()
    adapter = make_adapter()
    submit(parts, Caller(adapter=adapter), Caller(adapter=adapter))
    parts.step()
    assert parts.bank.num_uses == 2
    run(parts)
    assert parts.is_idle
    assert parts.bank.num_resident == 1  # kept for the next one


def test_a_step_without_work_computes_nothing():
    parts = make_parts()
    parts.step()
    assert parts.runner.batches == []


async def test_a_draining_engine_refuses():
    parts = make_parts()
    await parts.engine.drain(5)
    with pytest.raises(UnavailableError, match="shutting down"):
        submit(parts, Caller())
    assert parts.engine.num_open == 0


def test_metrics_count_each_ending_under_its_outcome(caplog):
    parts = make_parts()
    gone = Caller()
    submit(parts, Caller(), Caller([POISON]), Caller([NAN]), gone)
    cancel(parts, gone)
    run(parts)
    for outcome in ("length", "failed_precondition", "cancelled"):
        labels = {"outcome": outcome}
        assert parts.metrics.registry.get_sample_value("redmux_requests_total", labels) == 1
    assert parts.metrics.registry.get_sample_value("redmux_request_duration_seconds_count") == 4


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_every_request_gets_exactly_one_ending(data):
    """Random requests, good and bad, submitted and cancelled at random steps."""
    logging.disable(logging.CRITICAL)
    try:
        parts, callers = make_parts(max_running=3, num_blocks=8), []
        adapters = [None, *(make_adapter(i) for i in range(5))]
        for _ in range(data.draw(st.integers(1, 15))):
            action = data.draw(st.sampled_from(["submit", "submit", "step", "cancel"]))
            if action == "submit" and parts.engine.num_open < 6:
                common = [0, 1, 2, 3, 0, 1, 2, 3][: data.draw(st.integers(0, 8))]
                more = data.draw(st.lists(st.integers(0, POISON), min_size=1, max_size=4))
                prompt = common + more
                callers += submit(
                    parts,
                    Caller(
                        prompt,
                        data.draw(st.integers(1, 4)),
                        adapter=data.draw(st.sampled_from(adapters)),
                        tenant=data.draw(st.sampled_from("ab")),
                    ),
                )
            elif action == "cancel" and callers:
                cancel(parts, data.draw(st.sampled_from(callers)))
            else:
                parts.step()
        run(parts)
        parts.step()
    finally:
        logging.disable(logging.NOTSET)
    assert parts.is_idle
    assert parts.runner.misreads == []
    for caller in callers:
        assert len(caller.endings) == 1
        assert caller.events[-1] is caller.endings[0]
        bad = {POISON, NAN} & set(caller.request.prompt_ids)
        if not bad and not caller.request.early_end:
            last = caller.request.prompt_ids[-1]
            count = caller.request.max_tokens
            assert caller.tokens == [(last + i) % 4 for i in range(1, count + 1)]
        assert not (bad and caller.tokens)


def test_a_request_whose_deadline_has_passed_is_never_started():
    parts = make_parts(max_running=1)
    first, late, other = Caller(), Caller(deadline_s=time.monotonic() - 1), Caller()
    for caller in (first, late, other):
        parts.engine.submit(caller.request)
    while not other.endings:
        parts.step()
    assert isinstance(late.error, DeadlineExceededError)
    assert "before it was its turn" in str(late.error)
    assert all(late.request not in batch for batch in parts.runner.batches)
    assert first.reason is other.reason is FinishReason.LENGTH
    assert parts.is_idle


def test_a_running_request_ends_at_its_deadline():
    parts = make_parts()
    caller = Caller(max_tokens=9, deadline_s=time.monotonic() + 60)
    parts.engine.submit(caller.request)
    parts.step()
    caller.request.deadline_s = time.monotonic()
    parts.step()
    assert isinstance(caller.error, DeadlineExceededError)
    assert "after 1 tokens" in str(caller.error)
    assert caller.tokens == [1]
    assert parts.is_idle


def test_options_that_leave_no_token_end_their_request_alone():
    parts = make_parts()
    bad = Caller(sampling=SamplingParams(allowed_token_ids=(2,), bad_token_ids=(2,)))
    good = Caller()
    parts.engine.submit(bad.request)
    parts.engine.submit(good.request)
    while not good.endings:
        parts.step()
    assert isinstance(bad.error, FailedPreconditionError)
    assert "leave no token" in str(bad.error)
    assert good.tokens == [1, 2, 3]
    assert parts.is_idle
