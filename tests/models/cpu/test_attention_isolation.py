"""What a row of attention may depend on: its own request, up to its own position, and no more."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models.naive_attention import (
    Rule,
    as_kept,
    make_cache,
    make_sequences,
    naive,
    run_chunks,
    run_step,
)

from redmux_server.models.kvcache import LayerShape, Segment

EXACT = ("numba", "rounded")
CACHES = (*EXACT, "torch", "paged")
RULES = [Rule(0.3), Rule(0.3, 20), Rule(0.3, 0, 5.0), Rule(0.3, 33, 5.0)]
NAN = float("nan")

shapes = st.sampled_from(
    [LayerShape(2, 2, 4), LayerShape(6, 2, 12), LayerShape(3, 1, 64), LayerShape(4, 1, 128)]
)
rules = st.sampled_from(RULES)
seeds = st.integers(0, 2**20)


def alone(shape, sequence, num_blocks, rule, kind="numba"):
    return run_chunks(make_cache(kind, shape, num_blocks), sequence, [], rule)


@pytest.mark.parametrize("kind", EXACT)
@settings(max_examples=20, deadline=None)
@given(shapes, rules, st.integers(1, 80), st.sets(st.integers(1, 79)), seeds)
def test_no_chunking_changes_a_bit(kind, shape, rule, length, cuts, seed):
    (sequence,), num_blocks = make_sequences(seed, shape, [length])
    cuts = [cut for cut in cuts if cut < length]
    got = run_chunks(make_cache(kind, shape, num_blocks), sequence, cuts, rule)
    np.testing.assert_array_equal(got, alone(shape, sequence, num_blocks, rule, kind))


@pytest.mark.parametrize("kind", EXACT)
@settings(max_examples=10, deadline=None)
@given(shapes, rules, st.lists(st.integers(1, 60), min_size=2, max_size=5), seeds, st.randoms())
def test_no_neighbour_and_no_order_changes_a_bit(kind, shape, rule, lengths, seed, random):
    """Steps of random composition, each request advancing by random chunks."""
    sequences, num_blocks = make_sequences(seed, shape, lengths)
    cache = make_cache(kind, shape, num_blocks)
    done = [0] * len(sequences)
    got = [[] for _ in sequences]
    while any(n < len(s) for n, s in zip(done, sequences, strict=True)):
        open_ones = [i for i, s in enumerate(sequences) if done[i] < len(s)]
        chosen = random.sample(open_ones, random.randint(1, len(open_ones)))
        stops = [min(len(sequences[i]), done[i] + random.choice([1, 1, 3, 17])) for i in chosen]
        parts = [(sequences[i], done[i], b) for i, b in zip(chosen, stops, strict=True)]
        for i, stop, rows in zip(chosen, stops, run_step(cache, parts, rule), strict=True):
            got[i].append(rows)
            done[i] = stop
    for rows, sequence in zip(got, sequences, strict=True):
        expected = alone(shape, sequence, num_blocks, rule, kind)
        np.testing.assert_array_equal(np.concatenate(rows), expected)


def test_the_blocks_that_hold_a_request_do_not_change_a_bit():
    shape, rule = LayerShape(4, 2, 64), Rule(0.2)
    (sequence,), _ = make_sequences(0, shape, [70], spare=0)
    results = []
    for blocks in itertools.permutations([0, 3, 7]):
        sequence.blocks[:] = blocks
        results.append(run_chunks(make_cache("numba", shape, 8), sequence, [33], rule))
    for got in results[1:]:
        np.testing.assert_array_equal(got, results[0])


def test_the_number_of_threads_does_not_change_a_bit():
    import numba

    if numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("one thread only")
    shape, rule = LayerShape(4, 2, 64), Rule(0.2)
    (sequence,), num_blocks = make_sequences(0, shape, [70])
    before, got = numba.get_num_threads(), []
    try:
        for threads in (1, 2):
            numba.set_num_threads(threads)
            got.append(alone(shape, sequence, num_blocks, rule))
    finally:
        numba.set_num_threads(before)
    np.testing.assert_array_equal(*got)


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("poison", [NAN, float("inf"), 1e30])
def test_what_a_block_held_before_is_never_seen(kind, rule, poison):
    """Bitwise: the whole cache is full of rubbish against a fresh one full of zeros."""
    shape = LayerShape(4, 2, 12)
    sequences, num_blocks = make_sequences(7, shape, [45, 64, 3])
    results = []
    for fill in (None, poison):
        cache, got = make_cache(kind, shape, num_blocks, fill), []
        for start, stop in ((0, 0.5), (0.5, 0.9), (0.9, 1)):
            parts = [(s, int(start * len(s)), int(stop * len(s))) for s in sequences]
            got += run_step(cache, [p for p in parts if p[1] < p[2]], rule)
        results.append(np.concatenate(got))
    assert np.isfinite(results[1]).all()
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("kind", CACHES)
def test_poisoned_blocks_of_a_request_do_show(kind):
    """The counterpart of the tests around it: poison reaches what is read."""
    shape, rule = LayerShape(2, 1, 4), Rule(0.5)
    (sequence,), num_blocks = make_sequences(0, shape, [40])
    cache = make_cache(kind, shape, num_blocks)
    run_step(cache, [(sequence, 0, 39)], rule)
    cache.poison([sequence.blocks[0]], NAN)
    assert np.isnan(run_step(cache, [(sequence, 39, 40)], rule)[0]).all()


@pytest.mark.parametrize("kind", CACHES)
def test_blocks_left_of_the_window_are_never_seen(kind):
    shape, rule = LayerShape(2, 1, 4), Rule(0.5, 8)
    (sequence,), num_blocks = make_sequences(0, shape, [100])
    cache = make_cache(kind, shape, num_blocks)
    run_step(cache, [(sequence, 0, 99)], rule)
    cache.poison(sequence.blocks[:2], 1e30)
    got = run_step(cache, [(sequence, 99, 100)], rule)[0]
    np.testing.assert_allclose(got, naive(as_kept(kind, sequence), rule)[99:], atol=1e-5)


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_a_request_full_of_nan_harms_no_neighbour_and_shows_itself(kind, name):
    shape, rule = LayerShape(4, 2, 12), Rule(0.3)
    sequences, num_blocks = make_sequences(9, shape, [20, 41, 35])
    results = []
    for value in (1.0, NAN):
        getattr(sequences[1], name)[:] = value
        cache = make_cache(kind, shape, num_blocks)
        first = run_step(cache, [(s, 0, len(s) - 1) for s in sequences], rule)
        last = run_step(cache, [(s, len(s) - 1, len(s)) for s in sequences], rule)
        results.append([np.concatenate(pair) for pair in zip(first, last, strict=True)])
    good, bad = results
    assert np.isnan(bad[1]).all()
    np.testing.assert_array_equal(bad[0], good[0])
    np.testing.assert_array_equal(bad[2], good[2])


def test_a_later_token_never_changes_an_earlier_row():
    """Bitwise, even within one chunk."""
    shape, rule = LayerShape(4, 2, 12), Rule(0.3)
    (sequence,), num_blocks = make_sequences(9, shape, [40])
    before = alone(shape, sequence, num_blocks, rule)
    sequence.k[25:], sequence.v[25:] = NAN, NAN
    after = alone(shape, sequence, num_blocks, rule)
    assert np.isnan(after[25:]).all()
    np.testing.assert_array_equal(after[:25], before[:25])


@pytest.mark.parametrize("kind", CACHES)
def test_the_segments_of_a_step_are_gone_after_it_even_if_it_failed(kind):
    shape = LayerShape(2, 1, 4)
    (sequence,), num_blocks = make_sequences(0, shape, [4])
    cache = make_cache(kind, shape, num_blocks)
    run_step(cache, [(sequence, 0, 4)], Rule(0.5))
    assert tuple(cache.segments) == ()
    with pytest.raises(ValueError, match="inside"):
        run_failing_step(cache, sequence)
    assert tuple(cache.segments) == ()
    assert getattr(cache, "step_arrays", ()) == ()


def run_failing_step(cache, sequence):
    with cache.step([Segment(0, 4, 0, sequence.blocks)]):
        assert len(cache.segments) == 1
        raise ValueError("inside")
