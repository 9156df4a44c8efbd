"""What lies between the matrix products of a decoder layer, row by row, compiled by numba.

A row's result is one fixed chain of operations on that row, whatever rows are beside it. All that
ends in `_some` is one phase that threads share, see `phases`; it returns when all is done.
"""

import math

import numpy as np

from redmux_server.models.cpu.compiled import compiled
from redmux_server.models.cpu.folds import sum_squares
from redmux_server.models.cpu.narrow import is_narrowed, narrow_row
from redmux_server.models.cpu.phases import claim, finish
from redmux_server.models.cpu.vector import exp
from redmux_server.models.layer_norm import EPS

_ROWS = 4  # that a thread takes at a time


@compiled
def _edit_row(y, rows, row, starts):
    """y = scale * y + bias, then the LayerNorm of that, where the row's adapter has one.

    `starts` [2] is where the vectors of edit and LayerNorm lie in a row of the bank, -1 for none.
    """
    if starts[0] >= 0:
        vectors = rows[row, starts[0] : starts[0] + 2 * y.size]
        scale, bias = vectors[: y.size], vectors[y.size :]
        for d in range(y.size):
            y[d] = scale[d] * y[d] + bias[d]
    if starts[1] >= 0:
        vectors = rows[row, starts[1] : starts[1] + 2 * y.size + 1]
        if vectors[2 * y.size] != 0:
            _layer_norm_row(y, vectors)


@compiled
def _layer_norm_row(y, vectors):
    total = 0.0  # in fp64 and in order, not vectorised: few adapters bring one
    for d in range(y.size):
        total += y[d]
    mean = total / y.size
    total = 0.0
    for d in range(y.size):
        total += (y[d] - mean) * (y[d] - mean)
    inverse = 1.0 / math.sqrt(total / y.size + EPS)
    weight, bias = vectors[: y.size], vectors[y.size : 2 * y.size]
    for d in range(y.size):
        y[d] = np.float32((y[d] - mean) * inverse) * weight[d] + bias[d]


@compiled
def _norm_row(x, weight, eps, out):
    inverse = np.float32(1.0) / math.sqrt(sum_squares(x) / np.float32(x.size) + eps)
    for d in range(x.size):
        out[d] = x[d] * inverse * weight[d]


@compiled
def _gate_row(gate_up, out):
    width = out.size
    gate, up = gate_up[:width], gate_up[width:]
    # sigmoid(g) is 1 / (1 + e) for e = exp(-g), or e / (1 + e) for e = exp(g) left of zero: exp
    # takes no positive argument.
    for d in range(width):
        g = gate[d]
        e = exp(min(g, -g))
        top = np.float32(1.0) if g >= 0 else e
        out[d] = g * (top / (np.float32(1.0) + e)) * up[d]


@compiled
def norm_some(counters, thread, x, weight, eps, out, narrow, steps):
    """out = RMS norm of x, both [tokens, dim], times weight [dim]; `narrow`, `steps` as products
    take out, see `narrow_row`. All that is not narrow is fp32 and contiguous."""
    n, num_done = len(x), 0
    num_items = -(-n // _ROWS)
    item = claim(counters, thread, num_items)
    while item < num_items:
        for t in range(item * _ROWS, min(n, (item + 1) * _ROWS)):
            _norm_row(x[t], weight, eps, out[t])
            narrow_row(out[t], narrow[t], steps[t])
        num_done += 1
        item = claim(counters, thread, num_items)
    finish(counters, num_done, num_items)


@compiled
def add_norm_some(
    counters, thread, x, y, rows, row_of, starts, sum_starts, weight, eps, out, narrow, steps
):
    """Edits y, adds it to x, edits the sum, then as `norm_some` of the sum.

    Token t is edited by rows[row_of[t]]; where the vectors lie there, `starts` tells for y and
    `sum_starts` for the sum, see `_edit_row`. `y` is scratch afterwards.
    """
    n, num_done = len(x), 0
    num_items = -(-n // _ROWS)
    item = claim(counters, thread, num_items)
    while item < num_items:
        for t in range(item * _ROWS, min(n, (item + 1) * _ROWS)):
            xt, yt = x[t], y[t]
            _edit_row(yt, rows, row_of[t], starts)
            for d in range(xt.size):
                xt[d] += yt[d]
            _edit_row(xt, rows, row_of[t], sum_starts)
            _norm_row(xt, weight, eps, out[t])
            narrow_row(out[t], narrow[t], steps[t])
        num_done += 1
        item = claim(counters, thread, num_items)
    finish(counters, num_done, num_items)


@compiled
def gate_some(counters, thread, gate_up, rows, row_of, starts, out, narrow, steps):
    """out = silu(gate) * up, for gate_up [tokens, 2 * dim] and out [tokens, dim].

    Gate and up are edited before, as in `add_norm_some`, by starts[0] and starts[1].
    """
    n, width, num_done = len(out), out.shape[1], 0
    num_items = -(-n // _ROWS)
    item = claim(counters, thread, num_items)
    while item < num_items:
        for t in range(item * _ROWS, min(n, (item + 1) * _ROWS)):
            row = gate_up[t]
            _edit_row(row[:width], rows, row_of[t], starts[0])
            _edit_row(row[width:], rows, row_of[t], starts[1])
            _gate_row(row, out[t])
            narrow_row(out[t], narrow[t], steps[t])
        num_done += 1
        item = claim(counters, thread, num_items)
    finish(counters, num_done, num_items)


@compiled
def edit_some(counters, thread, y, widths, rows, row_of, starts):
    """Edits columns of y [tokens, sum of widths] in place, as `add_norm_some` edits its y.

    Part i is widths[i] wide and edited by starts[i].
    """
    n, num_done = len(y), 0
    num_items = -(-n // _ROWS)
    item = claim(counters, thread, num_items)
    while item < num_items:
        for t in range(item * _ROWS, min(n, (item + 1) * _ROWS)):
            at = 0
            for i in range(widths.size):
                _edit_row(y[t, at : at + widths[i]], rows, row_of[t], starts[i])
                at += widths[i]
        num_done += 1
        item = claim(counters, thread, num_items)
    finish(counters, num_done, num_items)


@compiled
def narrow_some(counters, thread, x, narrow, steps):
    """Rounds the rows of x [tokens, dim] to what products take; see `narrow_row`."""
    if is_narrowed(narrow):
        n, num_done = len(x), 0
        num_items = -(-n // _ROWS)
        item = claim(counters, thread, num_items)
        while item < num_items:
            for t in range(item * _ROWS, min(n, (item + 1) * _ROWS)):
                narrow_row(x[t], narrow[t], steps[t])
            num_done += 1
            item = claim(counters, thread, num_items)
        finish(counters, num_done, num_items)


@compiled
def _copy_row(x, out):
    for d in range(x.size):
        out[d] = x[d]


@compiled
def pick_some(counters, thread, chosen, x, y, steps, row_of, x_out, y_out, steps_out, row_of_out):
    """Copies the rows `chosen` of x, y, steps and row_of."""
    num_items, num_done = len(chosen), 0
    item = claim(counters, thread, num_items)
    while item < num_items:
        source = chosen[item]
        _copy_row(x[source], x_out[item])
        _copy_row(y[source], y_out[item])
        _copy_row(steps[source], steps_out[item])
        row_of_out[item] = row_of[source]
        num_done += 1
        item = claim(counters, thread, num_items)
    finish(counters, num_done, num_items)
