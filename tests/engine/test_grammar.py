"""Rows that follow a grammar: what they draw, how they end, and that no other row notices."""

import threading

import numpy as np
import pytest
import torch
from engine.fake_engine import POISON, VOCAB, Caller, make_parts, run
from grammars_at_hand import END, allowed, ids, make_matcher
from hypothesis import given, settings
from hypothesis import strategies as st

from redmux.errors import FailedPreconditionError
from redmux_server.engine.grammar import MaskThread, Matcher, apply_masks, bar_tokens
from redmux_server.engine.request import FinishReason, Request, SamplingParams
from redmux_server.engine.sampling import Exhausted, NonFinite, sample
from redmux_server.models.cpu.token_masks import bar_in_memory

IN_EVERY_WAY = [
    (bar_in_memory, torch.float32),
    *((bar_tokens, t) for t in (torch.float32, torch.float64, torch.bfloat16, torch.float16)),
]


def constrained(regex, max_tokens=9, prompt=(0,), **options):
    options = {"stop_token_ids": frozenset({END})} | options
    return Caller(prompt, max_tokens, matcher=make_matcher(regex), **options)


def test_a_row_draws_what_its_grammar_allows_and_ends_with_it_without_a_stop_token():
    caller = constrained("ba{2}d")
    run(make_parts(), caller)
    assert caller.tokens == ids("baad")
    assert caller.reason is FinishReason.STOP


def test_rows_are_barred_in_the_way_that_the_engine_was_given():
    barred = []

    def bar(logits, rows, masks):
        barred.append(len(rows))
        bar_in_memory(logits, rows, masks)

    callers = [constrained("ba{2}d", sampling=SamplingParams(temperature=1.0)) for _ in range(2)]
    run(make_parts(bar=bar), *callers)
    assert [caller.tokens for caller in callers] == [ids("baad")] * 2
    assert barred[-1] == 2


def test_the_end_may_be_drawn_where_the_text_may_end_and_only_there():
    caller = constrained("c{2,5}")  # the model wants the end behind every c
    run(make_parts(), caller)
    assert caller.tokens == [*ids("cc"), END]
    assert caller.reason is FinishReason.STOP


def test_a_text_that_max_tokens_cut_says_length():
    caller = constrained("ba{5}", max_tokens=3)
    run(make_parts(), caller)
    assert caller.tokens == ids("baa")
    assert caller.reason is FinishReason.LENGTH


def test_a_text_that_is_complete_with_its_last_token_says_stop():
    caller = constrained("baa", max_tokens=3)
    run(make_parts(), caller)
    assert caller.reason is FinishReason.STOP


def test_rows_with_and_without_a_grammar_draw_the_same_alone_and_together():
    def callers():
        yield from (constrained(regex, prompt=[i % 4]) for i, regex in enumerate(
            ("[a-g]{4}", "(ab|ba)*c", "g?f?e?d?", "c{3}", "[^a]{2,}")))  # fmt: skip
        yield from (Caller([i], 9) for i in range(4))

    alone, together = list(callers()), list(callers())
    for caller in alone:
        run(make_parts(), caller)
    run(make_parts(max_open=20, max_running=8, num_blocks=40), *together)
    assert [c.tokens for c in together] == [c.tokens for c in alone]
    assert [c.reason for c in together] == [c.reason for c in alone]


def test_a_row_whose_matcher_is_in_error_ends_with_it_and_no_other_does():
    caller, others = constrained("ba{5}"), [constrained("baad"), Caller([1], 3)]
    caller.request.matcher.state.consume_token(5)  # which its grammar does not allow
    parts = make_parts()
    run(parts, caller, *others)
    assert isinstance(caller.error, FailedPreconditionError)
    assert "\n" not in str(caller.error)
    assert others[0].tokens == ids("baad")
    assert others[1].tokens == [2, 3, 0]


def test_a_mask_that_cannot_be_computed_ends_its_row_alone():
    matcher = make_matcher("ba{5}")
    matcher.state.consume_token(5)
    matcher.fill(np.full(4, 255, np.uint8))
    caller, other = Caller([0], 3, matcher=matcher), Caller([1], 3)
    run(make_parts(), caller, other)
    assert caller.tokens == []
    assert str(caller.error) == matcher.error
    assert other.tokens == [2, 3, 0]


def test_a_row_that_is_left_no_token_ends_with_an_error_that_says_so():
    caller, other = constrained("ba"), Caller([1], 3)
    caller.request.matcher.mask = np.zeros(4, np.uint8)
    run(make_parts(), caller, other)
    assert isinstance(caller.error, FailedPreconditionError)
    assert "leave no token that may come next" in str(caller.error)
    assert other.tokens == [2, 3, 0]


def test_a_request_that_lost_its_place_goes_on_where_its_grammar_was():
    parts = make_parts(max_open=40, num_blocks=40, max_running=3)
    floods = [constrained("(ab){20}", 40, [i, 1, 2], tenant="flood") for i in range(4)]
    for caller in floods:
        parts.engine.submit(caller.request)
    for number in range(12):
        for _ in range(10):
            parts.step()
        parts.engine.submit(Caller([number % 4], 2, tenant=f"late-{number}").request)
    run(parts)
    assert parts.metrics.registry.get_sample_value("redmux_requests_sent_back_total") >= 3
    for caller in floods:
        assert caller.tokens == ids("ab" * 20)
        assert caller.reason is FinishReason.STOP


def test_a_step_that_fails_for_a_neighbour_moves_no_matcher_twice():
    parts = make_parts()
    caller = constrained("baadcc", prompt=[1])
    parts.engine.submit(caller.request)
    parts.step()
    poison = Caller([POISON])
    run(parts, poison)
    assert poison.endings
    assert caller.tokens == ids("baadcc")


def test_masks_are_computed_beside_the_pass_and_no_matcher_is_used_meanwhile(monkeypatch):
    parts = make_parts()
    passes = threading.Semaphore(0)
    is_filling = threading.Event()
    fill, take = MaskThread._fill, Matcher.take

    def slow_fill(self, matchers):
        is_filling.set()
        assert passes.acquire(timeout=60)  # the pass goes on while this waits
        fill(self, matchers)
        is_filling.clear()

    def checked_take(self, token_id):
        assert not is_filling.is_set()
        take(self, token_id)

    monkeypatch.setattr(MaskThread, "_fill", slow_fill)
    monkeypatch.setattr(Matcher, "take", checked_take)

    def in_pass(work):
        if any(item.request.matcher and item.request.matcher.mask is None for item in work):
            passes.release()

    parts.runner.before = in_pass
    caller = constrained("baad")
    run(parts, caller)
    assert caller.tokens == ids("baad")


def test_a_failed_pass_waits_for_the_masks_before_anything_else(monkeypatch):
    parts = make_parts()
    caller = constrained("baad", prompt=[1])
    parts.engine.submit(caller.request)
    parts.step()
    ended = []
    fill = MaskThread._fill
    monkeypatch.setattr(
        MaskThread, "_fill", lambda self, found: (fill(self, found), ended.append(len(found)))
    )
    seen = []

    def fail_once(work):
        seen.append(list(ended))
        if len(seen) == 1:
            raise RuntimeError("the pass failed")

    parts.runner.before = fail_once
    run(parts, Caller([1], 1))
    assert seen[1] == [1]
    assert caller.tokens == ids("baad")


def test_a_matcher_in_error_is_not_complete():
    matcher = make_matcher("ba")
    matcher.take(5)
    assert matcher.error
    assert matcher.state.is_stopped()  # as llguidance has it
    assert not matcher.is_complete


def test_a_copy_goes_its_own_way():
    first = make_matcher("ab|cd")
    second = first.copy()
    first.take(1)
    assert first.mask is None
    assert allowed(second) == [1, 3]
    second.take(3)
    assert not first.error
    assert not second.error


def request(matcher=None, **options):
    sampling = SamplingParams(temperature=options.pop("temperature", 0.0), seed=7)
    return Request(
        prompt_ids=[1], max_tokens=9, sampling=sampling, stop_token_ids=frozenset(), tenant="",
        adapter=None, logprobs=True, sink=None, matcher=matcher, **options,
    )  # fmt: skip


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.sampled_from(["", "a", "[bc]d", "[a-g]*", "g|f"]), min_size=1, max_size=6),
    st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.7, 1.5]),
)  # fmt: skip
def test_a_constrained_row_leaves_the_bits_of_all_others(regexes, seed, temperature):
    logits = torch.randn(len(regexes), VOCAB, generator=torch.Generator().manual_seed(seed))

    def requests(with_grammar):
        return [
            request(make_matcher(regex) if regex and with_grammar else None,
                    temperature=temperature)
            for regex in regexes
        ]  # fmt: skip

    free, mixed = sample(logits.clone(), requests(False)), sample(logits.clone(), requests(True))
    alone = [sample(logits[i : i + 1].clone(), [r])[0] for i, r in enumerate(requests(True))]
    assert mixed == alone
    for regex, before, after, constraint in zip(regexes, free, mixed, requests(True), strict=True):
        if not regex:
            assert after == before
        else:
            assert after.token_id in allowed(constraint.matcher)


def test_log_probabilities_are_those_before_the_mask():
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(1))
    expected = torch.log_softmax(logits, -1)[0, 6]
    (token,) = sample(logits.clone(), [request(make_matcher("f"))])
    assert token.token_id == 6
    assert token.logprob == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize(("bar", "dtype"), IN_EVERY_WAY)
def test_barring_a_value_that_is_not_finite_leaves_it_so(bar, dtype):
    logits = torch.tensor([[float("nan"), float("inf"), -float("inf"), 1.0, 2.0]], dtype=dtype)
    bar(logits, [0], [np.asarray([0b01000, 0, 0, 0], np.uint8)])
    assert logits[0, :2].isnan().all()
    assert logits[0, 2:].tolist() == [-float("inf"), 1.0, -float("inf")]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_mask_hides_no_value_that_is_not_finite(value):
    logits = torch.zeros(1, VOCAB)
    logits[0, 2] = value
    assert sample(logits, [request(make_matcher("f"))]) == [NonFinite()]


def test_all_barred_is_told_from_a_model_that_computes_nonsense():
    matcher = make_matcher("f")
    matcher.mask = np.zeros(4, np.uint8)
    (result,) = sample(torch.zeros(1, VOCAB), [request(matcher)])
    assert isinstance(result, Exhausted)


@pytest.mark.parametrize(("bar", "dtype"), IN_EVERY_WAY)
def test_masks_bar_the_same_tokens_in_every_way_of_applying_them(bar, dtype):
    """By the kernel, and as on a GPU, also of logits that inference mode computed."""
    generator = np.random.default_rng(0)
    for width in (8, 31, 64, 257):
        bits = generator.integers(0, 2, (4, -(-width // 32) * 32), np.uint8)
        bits[:, width:] = 0
        masks = [*np.packbits(bits, axis=1, bitorder="little")]
        masks[1] = None
        with torch.inference_mode():
            logits = torch.randn(4, width).to(dtype)
            before = logits.clone()
        apply_masks(logits, masks, bar)
        barred = torch.from_numpy(bits[:, :width] == 0)
        barred[1] = False
        assert torch.equal(logits, before.masked_fill(barred, -torch.inf))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0, 1, 2, VOCAB]))
def test_greedy_in_a_grammar_is_the_first_of_the_largest_that_it_allows(seed, num_allowed):
    """Also among equal values, and where the likeliest token of all is barred."""
    source = np.random.default_rng(seed)
    row = source.integers(0, 3, VOCAB).astype(np.float32)
    may = np.zeros(VOCAB, bool)
    may[source.choice(VOCAB, num_allowed, replace=False)] = True
    request = constrained("a+").request
    request.matcher.mask = np.packbits(np.pad(may, (0, -VOCAB % 32)), bitorder="little")
    (drawn,) = sample(torch.from_numpy(row)[None], [request])
    if num_allowed:
        assert drawn.token_id == int(np.where(may, row, -np.inf).argmax())
    else:
        assert isinstance(drawn, Exhausted)
