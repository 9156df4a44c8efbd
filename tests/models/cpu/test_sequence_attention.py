"""Attention over whole sequences: the formula's values, and the same bits in any company."""

import itertools

import numba
import numpy as np
import pytest

from redmux_server.models.cpu.sequence_attention import NO_BIAS, Panels, attend

LENGTHS = (1, 2, 5, 31, 32, 33, 64, 97)
SIZES = [(1, 64), (3, 8), (2, 40)]  # heads, head_dim
SCALE = 0.3


def make(num_heads, dim, lengths=LENGTHS, seed=0):
    rng = np.random.default_rng(seed)
    starts = np.cumsum([0, *lengths])
    qkv = rng.standard_normal((3, starts[-1], num_heads, dim), np.float32)
    bias = rng.standard_normal((num_heads, 2 * max(lengths) + 5), np.float32)
    return (*qkv, starts, bias)


def naive(q, k, v, bias):
    """softmax(q k / scale + bias) v of one sequence in fp64."""
    middle, n = bias.shape[1] // 2, len(q)
    distance = np.arange(n) - np.arange(n)[:, None]
    scores = np.einsum("ihd,jhd->hij", q.astype(float), k.astype(float)) * SCALE
    scores += bias[:, middle + distance]
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hij,jhd->ihd", weights / weights.sum(-1, keepdims=True), v.astype(float))


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("num_heads", "dim"), SIZES)
def test_values_are_those_of_the_formula(num_heads, dim, has_bias):
    q, k, v, starts, bias = make(num_heads, dim)
    got = attend(q, k, v, starts, bias if has_bias else NO_BIAS, SCALE)
    for start, stop in itertools.pairwise(starts):
        part = slice(start, stop)
        want = naive(q[part], k[part], v[part], bias if has_bias else np.zeros_like(bias))
        np.testing.assert_allclose(got[part], want, atol=1e-5)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("num_heads", "dim"), SIZES)
def test_a_sequence_has_the_same_bits_alone_and_in_any_order(num_heads, dim, has_bias):
    q, k, v, starts, bias = make(num_heads, dim)
    bias = bias if has_bias else NO_BIAS
    whole = attend(q, k, v, starts, bias, SCALE)
    parts = [np.arange(a, b) for a, b in itertools.pairwise(starts)]
    rng = np.random.default_rng(1)
    orders = [[i] for i in range(len(parts))] + [rng.permutation(len(parts)) for _ in range(3)]
    for order in orders:
        rows = np.concatenate([parts[i] for i in order])
        some = np.cumsum([0, *(len(parts[i]) for i in order)])
        assert np.array_equal(attend(q[rows], k[rows], v[rows], some, bias, SCALE), whole[rows])


def test_the_number_of_threads_changes_no_bit():
    q, k, v, starts, bias = make(3, 40)
    several = attend(q, k, v, starts, bias, SCALE)
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        assert np.array_equal(attend(q, k, v, starts, bias, SCALE), several)
    finally:
        numba.set_num_threads(before)


@pytest.mark.parametrize(("num_heads", "dim"), SIZES)
def test_keys_that_were_stored_give_a_query_the_bits_of_the_whole_sequence(num_heads, dim):
    q, k, v, _, bias = make(num_heads, dim, (70,))
    whole = attend(q, k, v, np.array([0, 70]), bias, SCALE)
    panels = Panels(num_heads, dim, 70)
    panels.store(0, k[:11], v[:11])
    panels.store(11, k[11:], v[11:])
    for row in (0, 10, 69):
        got = panels.attend(q[row : row + 1], 70, bias, row, SCALE)
        assert np.array_equal(got[0], whole[row])


def test_a_query_reads_no_key_behind_the_ones_it_is_given():
    q, k, v, _, bias = make(2, 40, (50,))
    panels, poisoned = Panels(2, 40, 50), Panels(2, 40, 50)
    panels.store(0, k[:37], v[:37])
    poisoned.store(0, k[:37], v[:37])
    poisoned.store(37, np.full_like(k[37:], np.nan), np.full_like(v[37:], np.nan))
    one, other = (p.attend(q[:1], 37, bias, 36, SCALE) for p in (panels, poisoned))
    assert np.array_equal(one, other)
