"""What lies between the matrix products of a decoder layer, row by row, compiled by numba.

A row's result is one fixed chain of operations on that row, whatever rows are beside it.
"""

import math
from typing import Any

import numba
import numpy as np
from numba import njit, prange

from redmux_server.models.vector import FASTMATH, LANES, claim, counters_of, exp

Array = np.ndarray[Any, Any]
# Waking the other threads costs more than this many values take.
_SERIAL_VALUES = 24_000
_ROWS = 8  # that a thread takes at a time


@njit(fastmath=FASTMATH, nogil=True, cache=True)
def _edit_row(y, vectors, start):
    """y = scale * y + bias; `start` is where the site's vectors lie in a row of the bank."""
    scale = vectors[start : start + y.size]
    bias = vectors[start + y.size : start + 2 * y.size]
    for d in range(y.size):
        y[d] = scale[d] * y[d] + bias[d]


@njit(fastmath=FASTMATH, nogil=True, cache=True)
def _norm_row(x, weight, eps, out, lanes):
    lanes[:] = np.float32(0.0)
    for p in range(x.size // LANES):
        part = x[p * LANES : (p + 1) * LANES]
        for d in range(LANES):
            lanes[d] += part[d] * part[d]
    for d in range(x.size // LANES * LANES, x.size):
        lanes[0] += x[d] * x[d]
    total = lanes[0]
    for d in range(1, LANES):
        total += lanes[d]
    inverse = np.float32(1.0) / math.sqrt(total / np.float32(x.size) + eps)
    for d in range(x.size):
        out[d] = x[d] * inverse * weight[d]


@njit(fastmath=FASTMATH, nogil=True, cache=True)
def _norm(first, last, x, weight, eps, out):
    lanes = np.empty(LANES, np.float32)
    for t in range(first, last):
        _norm_row(x[t], weight, eps, out[t], lanes)


@njit(fastmath=FASTMATH, nogil=True, cache=True)
def _add_norm(first, last, x, y, rows, row_of, start, weight, eps, out):
    lanes = np.empty(LANES, np.float32)
    for t in range(first, last):
        xt, yt = x[t], y[t]
        if start >= 0:
            _edit_row(yt, rows[row_of[t]], start)
        for d in range(xt.size):
            xt[d] += yt[d]
        _norm_row(xt, weight, eps, out[t], lanes)


@njit(fastmath=FASTMATH, nogil=True, cache=True)
def _gate(first, last, gate_up, out):
    width = out.shape[1]
    for t in range(first, last):
        gate, up, product = gate_up[t, :width], gate_up[t, width:], out[t]
        # sigmoid(g) is 1 / (1 + e) for e = exp(-g), or e / (1 + e) for e = exp(g) left of zero: exp
        # takes no positive argument. A loop of its own, as the compiler vectorises no longer one.
        for d in range(width):
            product[d] = exp(min(gate[d], -gate[d]))
        for d in range(width):
            e = product[d]
            top = np.float32(1.0) if gate[d] >= 0 else e
            product[d] = gate[d] * (top / (np.float32(1.0) + e)) * up[d]


@njit(fastmath=FASTMATH, nogil=True, cache=True)
def _edit(first, last, y, at, dim, rows, row_of, start):
    for t in range(first, last):
        _edit_row(y[t, at : at + dim], rows[row_of[t]], start)


@njit(fastmath=FASTMATH, nogil=True, parallel=True, cache=True)
def _norm_shared(num_threads, x, weight, eps, out):
    n, counters = x.shape[0], counters_of(num_threads)
    for thread in prange(num_threads):
        first = claim(counters, thread, -(-n // _ROWS)) * _ROWS
        while first < n:
            _norm(first, min(n, first + _ROWS), x, weight, eps, out)
            first = claim(counters, thread, -(-n // _ROWS)) * _ROWS


@njit(fastmath=FASTMATH, nogil=True, parallel=True, cache=True)
def _add_norm_shared(num_threads, x, y, rows, row_of, start, weight, eps, out):
    n, counters = x.shape[0], counters_of(num_threads)
    for thread in prange(num_threads):
        first = claim(counters, thread, -(-n // _ROWS)) * _ROWS
        while first < n:
            _add_norm(first, min(n, first + _ROWS), x, y, rows, row_of, start, weight, eps, out)
            first = claim(counters, thread, -(-n // _ROWS)) * _ROWS


@njit(fastmath=FASTMATH, nogil=True, parallel=True, cache=True)
def _gate_shared(num_threads, gate_up, out):
    n, counters = out.shape[0], counters_of(num_threads)
    for thread in prange(num_threads):
        first = claim(counters, thread, -(-n // _ROWS)) * _ROWS
        while first < n:
            _gate(first, min(n, first + _ROWS), gate_up, out)
            first = claim(counters, thread, -(-n // _ROWS)) * _ROWS


@njit(fastmath=FASTMATH, nogil=True, parallel=True, cache=True)
def _edit_shared(num_threads, y, at, dim, rows, row_of, start):
    n, counters = y.shape[0], counters_of(num_threads)
    for thread in prange(num_threads):
        first = claim(counters, thread, -(-n // _ROWS)) * _ROWS
        while first < n:
            _edit(first, min(n, first + _ROWS), y, at, dim, rows, row_of, start)
            first = claim(counters, thread, -(-n // _ROWS)) * _ROWS


def norm(x: Array, weight: Array, eps: np.float32, out: Array) -> None:
    """out = RMS norm of x, both [tokens, dim], times weight [dim]; all fp32 and contiguous."""
    if x.size < _SERIAL_VALUES:
        _norm(0, len(x), x, weight, eps, out)
    else:
        _norm_shared(numba.get_num_threads(), x, weight, eps, out)


def add_norm(
    x: Array, y: Array, rows: Array, row_of: Array, start: int,
    weight: Array, eps: np.float32, out: Array,
) -> None:  # fmt: skip
    """x += scale * y + bias, then out = RMS norm of x times weight; x, y, out [tokens, dim].

    Token t takes its vectors from rows[row_of[t], start:], scale first; `start` -1 edits nothing.
    `y` is scratch afterwards.
    """
    if x.size < _SERIAL_VALUES:
        _add_norm(0, len(x), x, y, rows, row_of, start, weight, eps, out)
    else:
        _add_norm_shared(numba.get_num_threads(), x, y, rows, row_of, start, weight, eps, out)


def gate(gate_up: Array, out: Array) -> None:
    """out = silu(gate) * up, for gate_up [tokens, 2 * dim] and out [tokens, dim]."""
    if out.size < _SERIAL_VALUES:
        _gate(0, len(out), gate_up, out)
    else:
        _gate_shared(numba.get_num_threads(), gate_up, out)


def edit(y: Array, at: int, dim: int, rows: Array, row_of: Array, start: int) -> None:
    """Edits columns at..at + dim of y [tokens, any] in place, as `add_norm` edits its y."""
    if len(y) * dim < _SERIAL_VALUES:
        _edit(0, len(y), y, at, dim, rows, row_of, start)
    else:
        _edit_shared(numba.get_num_threads(), y, at, dim, rows, row_of, start)
