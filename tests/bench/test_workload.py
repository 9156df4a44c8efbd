from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from redmux_bench.workload import Lengths, Workload, arrivals, assign

WORKLOAD = Workload(Lengths(3, 6), Lengths(2, 2), vocab_size=50)


def rng(seed=0):
    return np.random.default_rng(seed)


@given(st.integers(1, 300), st.integers(1, 300))
def test_distinct_assignment_uses_every_adapter_as_often_as_any_other(num_requests, num_adapters):
    counts = Counter(assign("distinct", num_requests, num_adapters, rng()))
    assert len(counts) == min(num_requests, num_adapters)
    assert max(counts.values()) - min(counts.values()) <= 1


@given(st.sampled_from(["distinct", "uniform", "zipf"]), st.integers(0, 50), st.integers(1, 50))
def test_every_request_gets_an_adapter_that_exists(kind, num_requests, num_adapters):
    drawn = assign(kind, num_requests, num_adapters, rng())
    assert len(drawn) == num_requests
    assert all(0 <= index < num_adapters for index in drawn)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_zipf_draws_adapters_in_proportion_to_a_power_of_their_rank(exponent):
    counts = Counter(assign("zipf", 40_000, 4, rng(), exponent))
    for rank in range(1, 4):
        assert counts[0] / counts[rank] == pytest.approx((rank + 1) ** exponent, rel=0.1)


def test_uniform_draws_all_adapters_alike():
    counts = Counter(assign("uniform", 40_000, 4, rng()))
    assert all(count == pytest.approx(10_000, rel=0.05) for count in counts.values())


def test_poisson_arrivals_have_the_rate_and_exponential_gaps():
    due_s = arrivals(5.0, 20_000, rng())
    gaps = np.diff([0.0, *due_s])
    assert (gaps > 0).all()
    assert gaps.mean() == pytest.approx(1 / 5, rel=0.03)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.03)


@given(st.integers(1, 20), st.integers(0, 20), st.integers(0, 9))
def test_lengths_stay_within_their_range_and_ids_within_the_vocabulary(low, extra, seed):
    workload = Workload(Lengths(low, low + extra), Lengths(7, 7), vocab_size=11)
    for request in workload.plan(8, [], seed):
        assert low <= len(request.prompt_ids) <= low + extra
        assert all(0 <= token_id < 11 for token_id in request.prompt_ids)
        assert request.output_tokens == 7


def test_both_ends_of_a_range_are_drawn():
    lengths = {len(r.prompt_ids) for r in WORKLOAD.plan(200, [], 0)}
    assert lengths == {3, 4, 5, 6}


def test_equal_seeds_give_equal_waves_and_others_do_not():
    assert WORKLOAD.plan(9, ["a", "b"], 4) == WORKLOAD.plan(9, ["a", "b"], 4)
    assert WORKLOAD.plan(9, ["a", "b"], 4) != WORKLOAD.plan(9, ["a", "b"], 5)


def test_a_load_without_adapters_asks_for_the_base_model_at_once():
    assert {(r.adapter, r.due_s) for r in WORKLOAD.plan(9, [], 0)} == {(None, None)}


def test_a_rate_gives_every_request_its_time():
    workload = Workload(Lengths(1, 1), Lengths(1, 1), vocab_size=9, rate_per_s=2.0)
    due_s = [r.due_s for r in workload.plan(9, [], 0)]
    assert due_s == sorted(due_s)
    assert due_s[0] > 0
