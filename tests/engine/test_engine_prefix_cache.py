"""Engine, stepped by hand: what the end of a request means for the prompts that begin like it."""

import logging

import pytest
from engine.fake_engine import NAN, POISON, Caller, make_adapter, make_parts
from engine.test_engine_steps import cancel, run, submit

PROMPT = [0, 1, 2, 3, 0, 1, 2, 3]


def ask(parts, prompt, **options):
    (caller,) = submit(parts, Caller(prompt, **options))
    run(parts)
    assert parts.is_idle
    assert parts.runner.misreads == []
    return caller


def test_a_finished_request_leaves_its_prompt_and_its_answer():
    parts = make_parts()
    first = ask(parts, [*PROMPT, 0], max_tokens=4)
    assert first.tokens == [1, 2, 3, 0]
    second = ask(parts, [*PROMPT, 0, *first.tokens, 1])
    assert second.request.num_cached == 12
    assert second.tokens == [2, 3, 0]


def test_only_the_tokens_that_are_not_cached_are_computed():
    parts = make_parts()
    ask(parts, [*PROMPT, 0], max_tokens=1)
    counts = []
    parts.runner.before = lambda work: counts.extend(item.count for item in work)
    ask(parts, [*PROMPT, 0], max_tokens=2)
    assert counts == [1, 1]


def test_metrics_count_cached_and_computed_prompt_tokens():
    parts = make_parts()
    for _ in range(3):
        ask(parts, [*PROMPT, 0], max_tokens=1)
    value = parts.metrics.registry.get_sample_value
    assert value("redmux_prompt_tokens_cached_total") == 16
    assert value("redmux_tokens_total", {"kind": "prefill"}) == 9 + 1 + 1


def test_a_request_that_was_cancelled_while_decoding_leaves_what_it_computed():
    parts = make_parts()
    (gone,) = submit(parts, Caller([*PROMPT, 0], max_tokens=20))
    for _ in range(5):  # two for the prompt of 9 tokens in steps of 8
        parts.step()
    cancel(parts, gone)
    run(parts)
    assert gone.tokens == [1, 2, 3, 0]
    assert ask(parts, [*PROMPT, 0, *gone.tokens]).request.num_cached == 12


@pytest.mark.parametrize("bad", [NAN, POISON])
def test_a_request_that_failed_leaves_nothing_not_even_what_it_found(bad):
    logging.disable(logging.CRITICAL)
    try:
        parts = make_parts()
        ask(parts, [*PROMPT, 0])
        assert ask(parts, [*PROMPT, bad]).request.num_cached == 8
        assert ask(parts, [*PROMPT, 0]).request.num_cached == 0
        assert ask(parts, [*PROMPT, bad, 0, 1, 2, 3]).request.num_cached == 8
        assert ask(parts, [*PROMPT, bad, 0, 1, 2, 3]).request.num_cached == 0
    finally:
        logging.disable(logging.NOTSET)


def test_a_value_that_is_not_finite_after_some_tokens_takes_the_prompt_with_it():
    parts = make_parts()
    (bad,) = submit(parts, Caller([*PROMPT, 0], max_tokens=9))
    for _ in range(4):
        parts.step()
    parts.runner.spoiled.add(bad.request)
    run(parts)
    assert len(bad.tokens) == 3
    assert ask(parts, [*PROMPT, 0]).request.num_cached == 0


def test_a_failed_step_is_repeated_behind_the_cached_blocks(caplog):
    parts = make_parts()
    ask(parts, [*PROMPT, 0])
    callers = submit(parts, Caller([*PROMPT, 0]), Caller([*PROMPT, POISON]), Caller([*PROMPT, 2]))
    run(parts)
    assert [c.request.num_cached for c in callers] == [8, 8, 8]
    assert [c.tokens for c in callers] == [[1, 2, 3], [], [3, 0, 1]]
    assert parts.is_idle
    assert parts.runner.misreads == []
    # The others have used the common blocks to a good end.
    assert ask(parts, [*PROMPT, 0]).request.num_cached == 8


def test_a_prompt_is_found_under_the_content_of_its_adapter():
    parts = make_parts()
    one, same, other = make_adapter(1), make_adapter(1), make_adapter(2)
    ask(parts, [*PROMPT, 0], adapter=one)
    assert ask(parts, [*PROMPT, 0], adapter=other).request.num_cached == 0
    assert ask(parts, [*PROMPT, 0]).request.num_cached == 0
    assert ask(parts, [*PROMPT, 0], adapter=same).request.num_cached == 8
