"""Both caches compute attention: against the formula in fp64, whatever the shape and the step."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models.naive_attention import (
    Rule,
    as_kept,
    make_cache,
    make_paged_cache,
    make_sequences,
    naive,
    run_chunks,
    run_step,
)
from numba import njit

from redmux_server.models.causal.torch_kvcache import TorchKVCache
from redmux_server.models.cpu.kvcache import NumbaKVCache
from redmux_server.models.cpu.vector import exp as _exp
from redmux_server.models.kvcache import LayerShape, Segment

CACHES = ("numba", "rounded", "torch", "paged")
HEAD_DIMS = (4, 6, 12, 64, 80, 128)
TOLERANCE = 2e-5  # of values around 1, from scores up to some dozens


def shapes():
    return st.builds(
        lambda kv, group, dim: LayerShape(kv * group, kv, dim),
        st.integers(1, 3),
        st.integers(1, 4),
        st.sampled_from(HEAD_DIMS),
    )


def rules():
    return st.builds(
        Rule,
        st.sampled_from([0.02, 0.05, 0.1]),
        st.sampled_from([0, 0, 1, 5, 32, 33, 50]),
        st.sampled_from([0.0, 0.0, 3.0, 30.0]),
    )


@pytest.mark.parametrize("kind", CACHES)
@settings(max_examples=20, deadline=None)
@given(
    shapes(), rules(), st.lists(st.integers(2, 75), min_size=1, max_size=4), st.integers(0, 2**20)
)
def test_mixed_decodes_and_prefills_equal_the_formula(kind, shape, rule, lengths, seed):
    sequences, num_blocks = make_sequences(seed, shape, lengths)
    cache = make_cache(kind, shape, num_blocks)
    rng = np.random.default_rng(seed)
    # Some requests have all but their last token in the cache, some a part of it, some nothing.
    known = [int(rng.choice([0, rng.integers(0, n), n - 1])) for n in lengths]
    before = [(s, 0, n) for s, n in zip(sequences, known, strict=True) if n]
    if before:
        run_step(cache, before, rule)
    now = [(s, n, len(s)) for s, n in zip(sequences, known, strict=True)]
    now.sort(key=lambda part: part[2] - part[1] > 1)  # decodes first
    for (sequence, start, _), got in zip(now, run_step(cache, now, rule), strict=True):
        expected = naive(as_kept(kind, sequence), rule)[start:]
        np.testing.assert_allclose(got, expected, atol=TOLERANCE)


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_head_size_equals_the_formula_token_by_token(kind, head_dim):
    shape, rule = LayerShape(4, 2, head_dim), Rule(head_dim**-0.5)
    (sequence,), num_blocks = make_sequences(1, shape, [40])
    got = run_chunks(make_cache(kind, shape, num_blocks), sequence, range(40), rule)
    np.testing.assert_allclose(got, naive(as_kept(kind, sequence), rule), atol=TOLERANCE)


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("window", [1, 2, 31, 32, 33, 64])
def test_a_window_counts_the_keys_that_a_row_sees(kind, window):
    shape, rule = LayerShape(2, 1, 4), Rule(0.5, window)
    (sequence,), num_blocks = make_sequences(2, shape, [100])
    got = run_chunks(make_cache(kind, shape, num_blocks), sequence, [7, 50, 51], rule)
    np.testing.assert_allclose(got, naive(as_kept(kind, sequence), rule), atol=TOLERANCE)


@pytest.mark.parametrize("kind", CACHES)
def test_a_window_of_one_key_returns_the_values_themselves(kind):
    shape = LayerShape(2, 2, 4)
    (sequence,), num_blocks = make_sequences(3, shape, [70])
    got = run_chunks(make_cache(kind, shape, num_blocks), sequence, [], Rule(0.5, 1))
    np.testing.assert_array_equal(got, as_kept(kind, sequence).v)


@pytest.mark.parametrize("kind", CACHES)
def test_each_group_of_query_heads_reads_its_own_kv_head(kind):
    """Values tell their KV head; every row of a head is an average of equal numbers."""
    shape = LayerShape(6, 3, 4)
    (sequence,), num_blocks = make_sequences(4, shape, [40])
    sequence.v[:] = np.array([1.0, 2.0, 4.0])[:, None]
    got = run_chunks(make_cache(kind, shape, num_blocks), sequence, [], Rule(0.5))
    expected = np.array([1.0, 1.0, 2.0, 2.0, 4.0, 4.0])[None, :, None]
    np.testing.assert_allclose(got, np.broadcast_to(expected, got.shape), rtol=1e-6)


@pytest.mark.parametrize("kind", CACHES)
def test_scores_far_apart_neither_overflow_nor_vanish(kind):
    shape, rule = LayerShape(2, 1, 4), Rule(50.0)
    (sequence,), num_blocks = make_sequences(5, shape, [40])
    got = run_chunks(make_cache(kind, shape, num_blocks), sequence, [], rule)
    expected = naive(as_kept(kind, sequence), rule)
    np.testing.assert_allclose(got, expected, atol=2e-4)  # scores are in the hundreds


@pytest.mark.parametrize("kind", CACHES)
def test_each_layer_keeps_its_own_keys_and_values(kind):
    shapes = [LayerShape(2, 1, 4), LayerShape(4, 2, 12)]
    if kind in ("numba", "rounded"):
        dtype = torch.float32 if kind == "numba" else torch.bfloat16
        cache = NumbaKVCache(shapes, 3, dtype)
    elif kind == "paged":
        cache = make_paged_cache(shapes, 3)
    else:
        cache = TorchKVCache(shapes, 3, torch.device("cpu"), torch.float32)
    rule, sequences = Rule(0.5), [make_sequences(i, s, [9])[0][0] for i, s in enumerate(shapes)]
    got = [[], []]
    for start, stop in ((0, 8), (8, 9)):  # the decode reads what the prefill wrote
        with cache.step([Segment(0, stop - start, start, [2])]):
            for i, s in enumerate(sequences):
                q, k, v = (
                    torch.from_numpy(x[start:stop]).transpose(0, 1)[None] for x in (s.q, s.k, s.v)
                )
                got[i].append(cache.layers[i](q, k, v, rule.scale, 0, 0.0)[0].numpy())
    for rows, sequence in zip(got, sequences, strict=True):
        expected = naive(as_kept(kind, sequence), rule)
        np.testing.assert_allclose(np.concatenate(rows), expected, atol=TOLERANCE)


@njit
def _exp_of_each(x, out):
    for i in range(len(x)):
        out[i] = _exp(x[i])


def test_exp_has_the_relative_error_that_it_states():
    rng = np.random.default_rng(0)
    x = np.concatenate(
        [
            np.linspace(-87, 0, 200_001),
            -(10.0 ** rng.uniform(-8, 1.9, 100_000)),
            np.arange(-125, 1) * np.log(2),  # where the exponent steps
            (np.arange(-125, 0) + 0.5) * np.log(2),
        ]
    ).astype(np.float32)
    got = np.empty_like(x)
    _exp_of_each(x, got)
    exact = np.exp(x.astype(np.float64))
    assert np.abs(got / exact - 1).max() < 2e-7


def test_exp_of_zero_is_one_and_of_anything_low_is_nothing():
    x = np.array([0.0, -0.0, -88.0, -1e4, -3e38, -np.inf], np.float32)
    got = np.empty_like(x)
    _exp_of_each(x, got)
    assert got[:2].tolist() == [1, 1]
    assert (got[2:] >= 0).all()
    assert (got[2:] < 2e-38).all()
