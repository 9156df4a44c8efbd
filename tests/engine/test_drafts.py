"""Drafts: what they never change, whom they may not disturb, and when there are none."""

import dataclasses

import pytest
import torch
from engine.fake_engine import BLOCK, NAN, VOCAB, Caller, FreeRows, make_adapter, make_parts, run
from grammars_at_hand import END, make_matcher
from hypothesis import given, settings
from hypothesis import strategies as st

from redmux.errors import FailedPreconditionError, RequestCancelledError
from redmux_server.engine.drafts import Drafts
from redmux_server.engine.request import Failed, FinishReason, SamplingParams

ADAPTERS = [None, make_adapter(1), make_adapter(2)]


def drafting(row_s=0.0, max_batch_tokens=64, **options):
    drafts = Drafts(max_batch_tokens, FreeRows(row_s))
    return make_parts(max_batch_tokens=max_batch_tokens, drafts=drafts, **options)


def plain(**options):
    return make_parts(max_batch_tokens=64, **options)


def counted(parts, name):
    return parts.metrics.registry.get_sample_value(f"redmux_{name}_total")


def test_an_answer_that_repeats_itself_takes_fewer_steps_and_has_the_same_tokens():
    with_drafts, without = Caller([0], max_tokens=40), Caller([0], max_tokens=40)
    parts = drafting()
    num_steps = run(parts, with_drafts)
    assert run(plain(), without) == 40
    assert num_steps < 20
    assert with_drafts.events == without.events
    num_accepted = counted(parts, "draft_tokens_accepted")
    assert num_accepted == 40 - num_steps
    assert counted(parts, "draft_tokens") >= num_accepted


def test_what_an_adapter_has_answered_is_drafted_from_the_first_token_on():
    parts = drafting()
    adapter = make_adapter()
    run(parts, *(Caller([0, 1], 6, adapter=adapter) for _ in range(4)))
    before = len(parts.runner.batches)
    (again,) = [Caller([2, 1], 6, adapter=adapter)]
    run(parts, again)
    assert again.tokens == [2, 3, 0, 1, 2, 3]
    assert len(parts.runner.batches) - before <= 2


@pytest.mark.parametrize(
    "other", [{"tenant": "another"}, {"adapter": ADAPTERS[2]}, {"adapter": None}]
)
def test_nobody_learns_from_another_tenant_or_adapter(other):
    parts = drafting()
    known = {"tenant": "one", "adapter": ADAPTERS[1]}
    run(parts, *(Caller([0, 1], 3, **known) for _ in range(6)))
    before = len(parts.runner.batches)
    run(parts, Caller([1], 3, **known | other))
    assert len(parts.runner.batches) - before == 3  # as if nobody had answered yet


class Repeating:
    """Logits that follow from the newest two tokens, the adapter and the part of the answer."""

    def __init__(self, parts, seed):
        self._seed = seed
        parts.runner.row = self.row

    def row(self, request, token_ids):
        digest = "" if request.adapter is None else request.adapter.digest
        part = (len(token_ids) - len(request.prompt_ids)) // 9
        key = hash((self._seed, *token_ids[-2:], digest, part)) % (1 << 32)
        return 2 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(key))


def repeat(seed, parts):
    Repeating(parts, seed)
    return parts


samplings = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.0, 0.5, 1.0]),
    seed=st.integers(0, 99),
    top_p=st.sampled_from([1.0, 0.8]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.5]),
    no_repeat_ngram=st.sampled_from([0, 0, 3]),
    min_tokens=st.sampled_from([0, 5]),
    bad_sequences=st.sampled_from([(), ((1, 2),)]),
)
requests = st.fixed_dictionaries({
    "prompt": st.lists(st.integers(0, 3), min_size=1, max_size=12),
    "max_tokens": st.integers(1, 30),
    "adapter": st.sampled_from(ADAPTERS),
    "tenant": st.sampled_from(["", "another"]),
    "sampling": samplings,
    "logprobs": st.booleans(),
    "num_top": st.integers(0, 2),
    "stop_token_ids": st.sampled_from([frozenset(), frozenset({7}), frozenset({END})]),
    "regex": st.sampled_from([None, None, "(ab|cd|efg){2,9}", "a[b-d]*"]),
    "num_followers": st.sampled_from([0, 0, 2]),
    "cancelled_after": st.sampled_from([None, None, 0, 3]),
})  # fmt: skip


def callers_of(choices):
    callers = []
    for choice in choices:
        options = dict(choice)
        regex, count = options.pop("regex"), options.pop("num_followers")
        after = options.pop("cancelled_after")
        matcher = None if regex is None else make_matcher(regex)
        family = [
            Caller(**options, matcher=matcher if matcher is None else matcher.copy())
            for _ in range(1 + count)
        ]
        for i, one in enumerate(family):
            one.request.sampling = dataclasses.replace(one.request.sampling, seed=i)
            one.cancelled_after = after
        family[0].request.followers = [one.request for one in family[1:]]
        callers.append(family)
    return callers


def answer(parts, families):
    """Runs them all, a new family every second step; some are cancelled on the way."""
    everyone = [one for family in families for one in family]
    for number in range(2000):
        if number % 2 == 0 and number // 2 < len(families):
            parts.engine.submit(families[number // 2][0].request)
        for one in everyone:
            if one.cancelled_after is not None and len(one.tokens) > one.cancelled_after:
                parts.engine.end(one.request, Failed(RequestCancelledError("gone")))
        parts.step()
        if number // 2 >= len(families) and not parts.engine.num_open:
            assert parts.is_idle
            assert not parts.runner.misreads
            return everyone
    raise AssertionError("requests are open after many steps")


@settings(max_examples=60, deadline=None)
@given(st.lists(requests, min_size=1, max_size=6), st.integers(0, 9), st.sampled_from([14, 60]))
def test_tokens_and_log_probabilities_are_those_without_drafts(choices, seed, num_blocks):
    options = {"num_blocks": num_blocks, "max_open": 100}
    drafted = answer(repeat(seed, drafting(**options)), callers_of(choices))
    expected = answer(repeat(seed, plain(**options)), callers_of(choices))
    for got, want in zip(drafted, expected, strict=True):
        if got.cancelled_after is None:
            assert _told(got) == _told(want)
        else:  # who comes further before it is noticed is a matter of time
            both = zip(got.tokens, want.tokens, strict=False)
            assert all(a == b for a, b in both)


def _told(caller):
    last = caller.events[-1]
    ending = str(last.error) if isinstance(last, Failed) else last
    return [*caller.events[:-1], ending]


def test_a_grammar_is_followed_token_by_token_through_a_draft():
    def one():
        matcher = make_matcher("(abcd){9}")
        return Caller([0], 40, matcher=matcher, stop_token_ids=frozenset({END}))

    with_drafts, without = one(), one()
    parts = drafting()
    assert run(parts, with_drafts) < run(plain(), without)
    assert with_drafts.events == without.events


def test_nothing_is_drawn_behind_a_stop_token_and_nothing_drafted_behind_it():
    parts, drafts = drafting(), []
    parts.runner.before = lambda work: drafts.extend(item.draft for item in work)
    callers = [Caller([0], 20, stop_token_ids=frozenset({3})) for _ in range(6)]
    for caller in callers:
        run(parts, caller)
    assert all(caller.tokens == [1, 2, 3] for caller in callers)
    assert all(caller.reason is FinishReason.STOP for caller in callers)
    assert (1, 2) in drafts
    assert not any(3 in draft for draft in drafts)


def test_no_draft_reaches_behind_the_most_tokens_of_a_request():
    parts = drafting()
    for max_tokens in (1, 2, 3, 9):
        for _ in range(3):
            caller = Caller([0], max_tokens)
            run(parts, caller)
            assert len(caller.tokens) == max_tokens


def test_rows_that_cost_as_much_as_steps_are_not_drafted():
    parts = drafting(row_s=100.0)
    callers = [Caller([i % 4], 30) for i in range(4)]
    run(parts, *callers)
    assert counted(parts, "draft_tokens") == 0


def test_drafts_take_what_the_tokens_of_a_step_leave():
    parts = drafting(max_batch_tokens=8)
    sizes = []
    parts.runner.before = lambda work: sizes.append(sum(item.count for item in work))
    run(parts, *(Caller([0], 30) for _ in range(4)))
    assert max(sizes) == 8


@pytest.mark.parametrize("seed", range(4))
def test_nobody_loses_a_place_to_a_draft_and_its_blocks_are_free_behind_the_step(seed):
    parts, without = (
        repeat(seed, make(num_blocks=12, max_running=3)) for make in (drafting, plain)
    )
    num_drafted = 0
    for one in (parts, without):
        callers = [Caller([i], 20) for i in range(3)]
        for caller in callers:
            one.engine.submit(caller.request)
        while one.engine.num_open:
            one.step()
            held = sum(len(r.blocks) for r in one.scheduler.running)
            needed = sum(-(-len(r.token_ids) // BLOCK) for r in one.scheduler.running)
            assert held <= needed
        num_drafted += counted(one, "draft_tokens")
    assert num_drafted > counted(parts, "draft_tokens_accepted")
    assert counted(parts, "requests_sent_back") <= counted(without, "requests_sent_back")


def test_a_tenant_is_charged_for_the_tokens_that_it_got():
    parts, without = drafting(), plain()
    for one in (parts, without):
        caller = Caller([0, 1], 30, tenant="a")
        one.engine.submit(caller.request)
        while len(caller.tokens) < 29:
            one.step()
            assert one.scheduler._served["a"] == 1 + len(caller.tokens)


def test_a_row_behind_a_draft_that_is_not_finite_fails_as_without():
    def spoil(parts):
        def row(request, token_ids):
            logits = torch.zeros(VOCAB)
            logits[(token_ids[-1] + 1) % 4] = 9
            if len(token_ids) > 17:
                logits[2] = float("nan")
            return logits

        parts.runner.row = row
        return parts

    with_drafts, without = Caller([0], 40), Caller([0], 40)
    run(spoil(drafting()), with_drafts)
    run(spoil(plain()), without)
    assert with_drafts.tokens == without.tokens
    assert isinstance(with_drafts.error, FailedPreconditionError)


def test_a_step_that_fails_with_drafts_is_computed_without_them(caplog):
    parts = drafting()
    run(parts, Caller([0], 20))

    def fail(work):
        if any(item.draft for item in work):
            raise RuntimeError("too much")

    parts.runner.before = fail
    caller = Caller([0], 20)
    run(parts, caller)
    assert caller.reason is FinishReason.LENGTH
    assert "a step of 1 requests failed" in caplog.text


def test_drawing_that_fails_behind_a_draft_costs_the_draft_alone(monkeypatch, caplog):
    parts = drafting()
    stack = torch.stack

    def fail(rows, *rest):
        raise RuntimeError("no memory")

    forward = parts.runner.forward

    def forward_and_break(work):
        monkeypatch.setattr(torch, "stack", stack)
        rows = forward(work)
        monkeypatch.setattr(torch, "stack", fail)
        return rows

    monkeypatch.setattr(parts.runner, "forward", forward_and_break)
    caller = Caller([0], 12)
    run(parts, caller)
    assert caller.tokens == [1, 2, 3, 0] * 3
    assert "drawing from drafts failed" in caplog.text


def test_answers_of_an_adapter_that_lost_its_row_are_forgotten():
    parts = drafting()
    drafts = parts.engine._stepper._drafts
    for seed in range(3):
        run(parts, Caller([0], 9, adapter=make_adapter(seed)))
    assert drafts.num_places > 0
    drafts.keep(lambda digest: False)
    assert drafts.num_places == 0
    for seed in range(3, 12):  # the bank has five rows
        run(parts, Caller([0], 9, adapter=make_adapter(seed)))
    assert len(drafts._answers) <= parts.bank.num_slots


def test_a_score_and_a_reading_and_their_prompts_have_no_drafts():
    parts = drafting()
    run(parts, Caller([0], 20))
    seen = []
    parts.runner.before = lambda work: seen.extend(item.draft for item in work)
    scored = Caller([0, 1, 2, 3], 4, targets=[1, 2, 3])
    parts.engine.submit(scored.request)
    parts.step()
    assert seen == [()]
    assert NAN not in scored.tokens


def test_a_draft_takes_no_block_that_holds_a_computed_beginning():
    parts = drafting(num_blocks=7, max_running=1)
    row = parts.runner.row

    def row_with_end(request, token_ids):
        if len(token_ids) < 5 * BLOCK or request.max_tokens == 1:
            return row(request, token_ids)
        return torch.eye(VOCAB)[7]

    parts.runner.row = row_with_end
    beginning = [0, 1, 2, 3, 0, 1, 2, 3, 0]
    run(parts, Caller(beginning, 1))  # leaves two full blocks
    assert parts.pool.num_unused == 5
    other = Caller([0], 60, tenant="another", stop_token_ids=frozenset({7}))
    run(parts, other)  # drafts reach farther
    assert counted(parts, "draft_tokens") > 0
    again = Caller(beginning, 1)
    run(parts, again)
    assert again.request.num_cached == 8
