import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from redmux import NotFoundError, ResourceExhaustedError
from redmux_bench.load import Call, Wave
from redmux_bench.rounds import in_turn, median_ratio, rotated
from redmux_bench.summary import Percentiles, summarize

SECONDS = st.floats(0.001, 1000)


def naive_percentile(values, share):
    """Between the two values that enclose the rank, in proportion."""
    ordered = sorted(values)
    rank = share * (len(ordered) - 1)
    below = int(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (rank - below) * (ordered[above] - ordered[below])


@given(st.lists(SECONDS, min_size=1, max_size=50))
def test_percentiles_are_interpolated_and_in_milliseconds(values):
    got = Percentiles.of(values)
    for share, value in ((0.5, got.p50), (0.9, got.p90), (0.99, got.p99)):
        assert value == pytest.approx(1e3 * naive_percentile(values, share))


def call(started_s, *token_times_s, error=None):
    ended_s = max((started_s, *token_times_s)) + 0.5
    return Call(10, started_s, token_times_s, ended_s, error)


def test_a_wave_is_summed_up_over_the_requests_that_completed():
    wave = Wave(
        [
            call(0.0, 1.0, 1.25, 1.5),
            call(1.0, 3.0),
            call(0.0, 9.0, error=NotFoundError("no adapter")),
            call(0.0, error=ResourceExhaustedError("full")),
            call(0.0, error=ResourceExhaustedError("full")),
        ],
        duration_s=4.0,
        client_cpu_s=0.25,
    )
    got = summarize(wave)
    assert (got.num_requests, got.num_completed) == (5, 2)
    assert got.failures == {"ResourceExhaustedError": 2, "NotFoundError": 1}
    assert (got.output_tokens, got.prompt_tokens) == (4, 20)
    assert got.output_tokens_per_s == 1.0
    assert got.prompt_tokens_per_s == 5.0
    assert got.requests_per_s == 0.5
    assert got.time_to_first_token_ms.p50 == 1500  # of 1 s and 2 s
    assert got.inter_token_ms.p50 == 250
    assert got.end_to_end_ms.p50 == 2250  # of 2 s and 2.5 s
    assert got.client_cpu_s == 0.25


def test_a_wave_in_which_nothing_completed_has_no_latencies():
    got = summarize(Wave([call(0.0, error=NotFoundError("none"))], 2.0, 0.0))
    assert got.output_tokens_per_s == 0
    assert got.time_to_first_token_ms is got.inter_token_ms is got.end_to_end_ms is None


@given(st.lists(st.tuples(SECONDS, st.floats(0.1, 10)), min_size=1, max_size=9))
def test_a_ratio_is_not_moved_by_how_fast_the_machine_is_in_a_round(rounds):
    ratios = [ratio for _, ratio in rounds]
    values = [speed * ratio for speed, ratio in rounds]
    references = [speed for speed, _ in rounds]
    assert median_ratio(values, references) == pytest.approx(statistics.median(ratios))


def test_a_ratio_needs_both_members_of_every_round():
    with pytest.raises(ValueError, match="zip"):
        median_ratio([1.0, 2.0], [1.0])


@given(st.lists(st.integers(), min_size=1, max_size=8, unique=True), st.integers(0, 99))
def test_every_item_has_every_place_once_in_as_many_rounds_as_there_are_items(items, first):
    rounds = [rotated(items, first + i) for i in range(len(items))]
    for order in rounds:
        assert sorted(order) == sorted(items)
    for place in zip(*rounds, strict=True):
        assert sorted(place) == sorted(items)


def test_measurements_take_turns_and_rounds_of_warming_up_do_not_count():
    order = []

    def measure(name):
        order.append(name)
        return float(len(order))

    got = in_turn(2, lambda: measure("a"), lambda: measure("b"))
    assert order == ["a", "b"] * 3
    assert got == [[3.0, 5.0], [4.0, 6.0]]
