"""Failures in a row: the bare base model tells whether requests or the model itself are broken."""

import logging

import pytest
from engine.fake_engine import NAN, POISON, Caller, make_adapter, make_parts
from engine.test_engine_readings import reader
from engine.test_engine_steps import run, submit

from redmux.errors import FailedPreconditionError, RedmuxError


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def break_down(work):
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.mark.parametrize("make", [lambda: Caller([0]), lambda: reader([1])])
def test_a_model_that_fails_for_everybody_and_for_the_probe_ends_the_engine(make):
    parts = make_parts()
    parts.runner.before = break_down
    submit(parts, *(make() for _ in range(4)))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        parts.step()
    probe = parts.runner.batches[-1][0]
    assert (probe.prompt_ids, probe.adapter, probe.slot) == ([0], None, None)
    assert probe.source_ids == ()


def test_a_base_that_computes_no_finite_values_ends_the_engine():
    parts = make_parts()
    parts.runner.before = lambda work: parts.runner.spoiled.update(item.request for item in work)
    submit(parts, *(Caller([0]) for _ in range(3)))
    with pytest.raises(RuntimeError, match="not finite"):
        parts.step()


def test_failures_in_several_steps_count_together():
    parts = make_parts()
    parts.runner.before = break_down
    for _ in range(2):
        submit(parts, Caller([0]))
        parts.step()
    submit(parts, Caller([0]))
    with pytest.raises(RuntimeError):
        parts.step()


@pytest.mark.parametrize(("bad", "error"), [(POISON, RedmuxError), (NAN, FailedPreconditionError)])
def test_any_number_of_bad_requests_beside_a_sound_model_ends_nothing(bad, error):
    parts = make_parts(max_open=40)
    callers = submit(parts, *(Caller([bad], adapter=make_adapter(i)) for i in range(20)))
    run(parts)
    assert all(isinstance(caller.error, error) for caller in callers)
    (good,) = submit(parts, Caller([0]))
    run(parts)
    assert good.tokens == [1, 2, 3]
    assert parts.is_idle
    assert parts.runner.misreads == []


def test_what_succeeds_in_between_starts_the_count_anew():
    parts = make_parts()
    for _ in range(5):
        submit(parts, Caller([POISON]), Caller([POISON]))
        run(parts)
        submit(parts, Caller([0]))
        run(parts)
    assert all(request.prompt_ids != [0] or request.max_tokens == 3
               for batch in parts.runner.batches for request in batch)  # fmt: skip


def test_a_probe_that_finds_no_free_block_is_left_out():
    parts = make_parts(num_blocks=4, max_running=4)
    bad = submit(parts, *(Caller([POISON], max_tokens=1) for _ in range(3)))
    (good,) = submit(parts, Caller([0], max_tokens=4))
    run(parts)
    assert all(isinstance(caller.error, RedmuxError) for caller in bad)
    assert good.tokens == [1, 2, 3, 0]
    assert parts.is_idle


def test_a_model_that_breaks_after_it_was_found_sound_is_found_out_as_well():
    parts = make_parts()
    submit(parts, *(Caller([POISON]) for _ in range(4)))
    run(parts)
    parts.runner.before = break_down
    submit(parts, *(Caller([0]) for _ in range(4)))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        parts.step()
