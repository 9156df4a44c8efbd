"""The CPU kernels: the formulas in fp64, and rows that do not know of each other."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit, prange

from redmux_server.models.cpu.arithmetic import PANEL
from redmux_server.models.cpu.folds import LANES, largest, sum_squares, total
from redmux_server.models.cpu.phases import claim, counters_of, finish
from redmux_server.models.cpu.row_kernels import (
    add_norm_some,
    edit_some,
    gate_some,
    norm_some,
    pick_some,
)
from redmux_server.models.cpu.vector import product

EPS = np.float32(1e-5)
DIMS = (16, 20, 64, 576)


NOTHING, NOBODY = np.zeros((1, 0), np.float32), np.zeros(90, np.int32)
UNEDITED = np.full((2, 2), -1)


def at(*starts):
    """Where the vectors of sites lie, which have no LayerNorm."""
    return np.array([[start, -1] for start in starts])


@njit(parallel=True)
def _norm(threads, *args):
    counters = counters_of(1, threads)
    for thread in prange(threads):
        norm_some(counters[0], thread, *args)


@njit(parallel=True)
def _add_norm(threads, *args):
    counters = counters_of(1, threads)
    for thread in prange(threads):
        add_norm_some(counters[0], thread, *args)


@njit(parallel=True)
def _gate(threads, *args):
    counters = counters_of(1, threads)
    for thread in prange(threads):
        gate_some(counters[0], thread, *args)


@njit(parallel=True)
def _edit(threads, *args):
    counters = counters_of(1, threads)
    for thread in prange(threads):
        edit_some(counters[0], thread, *args)


def steps_of(x):
    return np.empty((len(x), 1), np.float32)


def norm(x, weight, eps, out, threads=2):
    _norm(threads, x, weight, eps, out, out, steps_of(x))


def add_norm(x, y, rows, row_of, start, weight, eps, out, threads=2, sum_start=-1):
    starts, of_sum = at(start, sum_start)
    _add_norm(threads, x, y, rows, row_of, starts, of_sum, weight, eps, out, out, steps_of(x))


def gate(gate_up, out, rows=NOTHING, row_of=NOBODY, starts=UNEDITED, threads=2):
    _gate(threads, gate_up, rows, row_of, starts, out, out, steps_of(out))


@njit
def _multiply(rows, columns, a, panels, n, out, add):
    apart = panels.shape[1] * PANEL
    product(rows, columns, a, 0, a.shape[1], panels, 0, apart, n, out, 0, out.shape[1], add, 0)


def multiply(rows, columns, a, b, n, out, add):
    panels = b.reshape(len(b), -1, PANEL).transpose(1, 0, 2).copy()
    _multiply(rows, columns, a, panels, n, out, add)


def randn(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 13), st.integers(1, 5), st.integers(0, 70), st.booleans(), st.integers(0, 99))
def test_a_product_is_the_sum_of_products_and_touches_nothing_else(rows, panels, n, adds, seed):
    columns = panels * PANEL
    a, b = randn(seed, rows + 1, n + 3), randn(seed + 1, n + 1, columns + PANEL)
    out = randn(seed + 2, rows + 1, columns + PANEL)
    before = out.copy()
    multiply(rows, columns, a, b, n, out, int(adds))
    want = before.astype(np.float64)
    want[:rows, :columns] *= adds
    want[:rows, :columns] += a[:rows, :n].astype(np.float64) @ b[:n, :columns]
    np.testing.assert_allclose(out, want, atol=2e-5)
    np.testing.assert_array_equal(out[rows:], before[rows:])
    np.testing.assert_array_equal(out[:, columns:], before[:, columns:])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 13), st.integers(1, 4), st.integers(1, 70), st.integers(0, 99))
def test_a_row_of_a_product_has_the_same_bits_alone_and_cut_in_two(rows, panels, n, seed):
    columns = panels * PANEL
    a, b = randn(seed, rows, n), randn(seed + 1, n, columns)
    together = np.empty((rows, columns), np.float32)
    multiply(rows, columns, a, b, n, together, 0)
    for r in range(rows):
        alone = np.empty((1, columns), np.float32)
        cut = n // 2
        multiply(1, columns, a[r : r + 1, :cut].copy(), b, cut, alone, 0)
        multiply(1, columns, a[r : r + 1, cut:].copy(), b[cut:].copy(), n - cut, alone, 1)
        np.testing.assert_array_equal(alone[0], together[r])


def rms(x, weight):
    x = x.astype(np.float64)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * weight


@pytest.mark.parametrize("dim", DIMS)
def test_a_norm_is_the_formula(dim):
    x, weight, out = randn(1, 9, dim), randn(2, dim), np.empty((9, dim), np.float32)
    norm(x, weight, EPS, out)
    np.testing.assert_allclose(out, rms(x, weight), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("dim", DIMS)
def test_each_row_is_edited_by_its_owner_then_added_then_normalised(dim):
    x, y, weight, rows = randn(1, 9, dim), randn(2, 9, dim), randn(3, dim), randn(4, 5, 3 + 2 * dim)
    owners = np.array([0, 4, 4, 1, 3, 2, 0, 1, 4], np.int32)
    want = x.astype(np.float64)
    want += rows[owners, 3 : 3 + dim].astype(np.float64) * y + rows[owners, 3 + dim :]
    out = np.empty_like(x)
    add_norm(x, y, rows, owners, 3, weight, EPS, out)
    np.testing.assert_allclose(x, want, atol=2e-6)
    np.testing.assert_allclose(out, rms(want, weight), rtol=2e-5, atol=2e-6)


def test_the_sum_is_edited_before_it_is_normalised():
    x, y, weight, rows = randn(1, 9, 20), randn(2, 9, 20), randn(3, 20), randn(4, 5, 100)
    owners, out = np.array([0, 4, 4, 1, 3, 2, 0, 1, 4], np.int32), np.empty_like(x)
    own = rows[owners].astype(np.float64)
    want = own[:, 50:70] * (x + (own[:, 3:23] * y + own[:, 23:43])) + own[:, 70:90]
    add_norm(x, y, rows, owners, 3, weight, EPS, out, sum_start=50)
    np.testing.assert_allclose(x, want, atol=4e-6)
    np.testing.assert_allclose(out, rms(want, weight), rtol=4e-5, atol=4e-6)


def test_a_layer_norm_behind_an_edit_is_the_formula_where_the_row_has_it_and_nothing_elsewhere():
    y, rows = 3 * randn(1, 6, 20) + 1, randn(2, 3, 84)
    owners = np.array([2, 0, 1, 1, 0, 2], np.int32)
    rows[:, 83] = [0, 1, 1]  # the switch behind weight and bias
    own, edited = rows[owners].astype(np.float64), y.copy()
    want = own[:, 2:22] * y + own[:, 22:42]
    mean, variance = want.mean(-1, keepdims=True), want.var(-1, keepdims=True)
    normed = (want - mean) / np.sqrt(variance + 1e-5) * own[:, 43:63] + own[:, 63:83]
    _edit(2, edited, np.array([20]), rows, owners, np.array([[2, 43]]))
    np.testing.assert_allclose(edited, np.where(own[:, 83:] == 1, normed, want), atol=5e-6)
    without = y.copy()
    _edit(2, without, np.array([20]), rows, owners, np.array([[2, -1]]))
    np.testing.assert_array_equal(edited[owners == 0], without[owners == 0])


def test_without_an_edit_rows_are_just_added():
    x, y, weight = randn(1, 9, 64), randn(2, 9, 64), randn(3, 64)
    want, out = x + y, np.empty_like(x)
    add_norm(x, y, np.zeros((1, 0), np.float32), np.zeros(9, np.int32), -1, weight, EPS, out)
    np.testing.assert_array_equal(x, want)


def test_the_identity_s_vectors_change_no_bit():
    x, y, weight = randn(1, 9, 64), randn(2, 9, 64), randn(3, 64)
    rows = np.concatenate((np.ones((1, 64)), np.zeros((1, 64))), 1).astype(np.float32)
    results = []
    for start in (-1, 0):
        mine, out = x.copy(), np.empty_like(x)
        add_norm(mine, y.copy(), rows, np.zeros(9, np.int32), start, weight, EPS, out)
        results.append((mine, out))
    np.testing.assert_array_equal(results[0], results[1])


@pytest.mark.parametrize("dim", [1, 16, 50, 1536])
def test_a_gate_is_silu_times_up(dim):
    gate_up = 8 * randn(1, 9, 2 * dim)
    gate_up[0, 0], gate_up[1, 0], gate_up[2, 0] = 300, -300, 0
    out = np.empty((9, dim), np.float32)
    gate(gate_up, out)
    left, right = gate_up[:, :dim].astype(np.float64), gate_up[:, dim:]
    np.testing.assert_allclose(out, left / (1 + np.exp(-left)) * right, rtol=2e-6, atol=1e-6)


def test_an_edit_touches_its_columns_only():
    y, rows, owners = randn(1, 6, 50), randn(2, 3, 40), np.array([2, 0, 1, 1, 0, 2], np.int32)
    want = y.copy()
    want[:, 10:26] = rows[owners, 5:21] * y[:, 10:26] + rows[owners, 21:37]
    _edit(2, y, np.array([10, 16, 24]), rows, owners, at(-1, 5, -1))
    np.testing.assert_allclose(y, want, atol=2e-6)
    np.testing.assert_array_equal(y[:, :10], want[:, :10])
    np.testing.assert_array_equal(y[:, 26:], want[:, 26:])


def test_gate_and_up_are_edited_before_they_meet():
    gate_up, rows = randn(1, 5, 32), randn(2, 3, 70)
    owners, out = np.array([2, 0, 1, 1, 0], np.int32), np.empty((5, 16), np.float32)
    want = gate_up.astype(np.float64)
    want[:, :16] = rows[owners, 3:19] * want[:, :16] + rows[owners, 19:35]
    want[:, 16:] = rows[owners, 36:52] * want[:, 16:] + rows[owners, 52:68]
    gate(gate_up, out, rows, owners, at(3, 36))
    left, right = want[:, :16], want[:, 16:]
    np.testing.assert_allclose(out, left / (1 + np.exp(-left)) * right, rtol=1e-5, atol=1e-6)


@njit(parallel=True)
def _count(threads, rounds, num_items, seen):
    """Every thread adds 1 to its items of a round if all items of the rounds before have theirs."""
    counters = counters_of(rounds, threads)
    for thread in prange(threads):
        for r in range(rounds):
            done = 0
            item = claim(counters[r], thread, num_items)
            while item < num_items:
                complete = True
                for other in range(num_items):
                    complete = complete and (r == 0 or seen[r - 1, other] == 1)
                if complete:
                    seen[r, item] += 1
                done += 1
                item = claim(counters[r], thread, num_items)
            finish(counters[r], done, num_items)


@pytest.mark.parametrize(("threads", "items"), [(1, 5), (2, 1), (2, 7), (2, 0)])
def test_every_item_is_taken_once_and_a_phase_ends_before_the_next_begins(threads, items):
    seen = np.zeros((300, items), np.int64)
    _count(threads, 300, items, seen)
    assert (seen == 1).all()


@njit
def _as_two_threads_one_after_the_other(rounds, num_items, seen):
    counters = counters_of(rounds, 2)
    for thread in range(2):
        for r in range(rounds):
            done = 0
            item = claim(counters[r], thread, num_items)
            while item < num_items:
                seen[r, item] += 1
                done += 1
                item = claim(counters[r], thread, num_items)
            finish(counters[r], done, num_items)


def test_a_thread_that_never_starts_holds_up_nobody():
    seen = np.zeros((9, 11), np.int64)
    _as_two_threads_one_after_the_other(9, 11, seen)
    assert (seen == 1).all()


@njit
def _pick(chosen, x, y, steps, owners, *outs):
    pick_some(counters_of(1, 1)[0], 0, chosen, x, y, steps, owners, *outs)


def test_chosen_rows_are_copied_with_all_that_belongs_to_them():
    x, y, steps, owners = (
        randn(1, 5, 4),
        randn(2, 5, 3),
        randn(3, 5, 2),
        np.arange(5, dtype=np.int32),
    )
    chosen = np.array([4, 0, 0])
    outs = [np.empty((3, *array.shape[1:]), array.dtype) for array in (x, y, steps, owners)]
    _pick(chosen, x, y, steps, owners, *outs)
    for out, array in zip(outs, (x, y, steps, owners), strict=True):
        np.testing.assert_array_equal(out, array[chosen])


@pytest.mark.parametrize("num_tokens", [1, 7, 90])
def test_rows_have_the_same_bits_alone_and_together(num_tokens):
    x, y, weight = randn(1, num_tokens, 576), randn(2, num_tokens, 576), randn(3, 576)
    rows = randn(4, num_tokens, 1152)
    owners = np.arange(num_tokens, dtype=np.int32)[::-1].copy()
    together, out, gated = x.copy(), np.empty_like(x), np.empty((num_tokens, 288), np.float32)
    add_norm(together, y.copy(), rows, owners, 0, weight, EPS, out)
    gate(x, gated)
    for t in range(num_tokens):
        part = slice(t, t + 1)
        mine, normed, half = x[part].copy(), np.empty((1, 576), np.float32), gated[part].copy()
        add_norm(mine, y[part].copy(), rows, owners[part], 0, weight, EPS, normed)
        np.testing.assert_array_equal(mine, together[part])
        np.testing.assert_array_equal(normed, out[part])
        gate(x[part], half)
        np.testing.assert_array_equal(half, gated[part])


def test_a_value_that_is_no_number_stays_in_its_row():
    x, y, weight = randn(1, 3, 64), randn(2, 3, 64), randn(3, 64)
    y[1, 5] = np.nan
    out = np.empty_like(x)
    add_norm(x, y, np.zeros((1, 0), np.float32), np.zeros(3, np.int32), -1, weight, EPS, out)
    assert np.isnan(out[1]).all()
    assert np.isfinite(out[[0, 2]]).all()
    gate_up = randn(4, 3, 32)
    gate_up[1, 3] = np.nan
    half = np.empty((3, 16), np.float32)
    gate(gate_up, half)
    assert np.isnan(half[1, 3])
    assert np.isfinite(half[[0, 2]]).all()


@njit
def _folds(x):
    return largest(x), total(x), sum_squares(x)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(0, 2 * LANES), st.integers(0, 99))
def test_folds_are_the_formulas(whole, rest, seed):
    x = randn(seed, whole * LANES + rest)
    full = x[: whole * LANES]
    highest, added, _ = _folds(full)
    assert highest == full.max()
    np.testing.assert_allclose(added, full.sum(dtype=np.float64), atol=1e-4)
    squares = _folds(x)[2]
    np.testing.assert_allclose(squares, (x.astype(np.float64) ** 2).sum(), rtol=1e-5)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_a_sum_has_the_same_bits_with_zeros_behind_it(whole, more, seed):
    x = randn(seed, whole * LANES)
    padded = np.concatenate((x, np.zeros(more * LANES, np.float32)))
    assert _folds(padded)[1] == _folds(x)[1]
