"""PackedLinear: a frozen fp32 linear layer for the CPU, its weight laid out as it is read."""

from typing import Any

import numba
import numpy as np
import torch
from numba import njit, prange
from torch import Tensor, nn

from redmux_server.models.vector import FASTMATH, PANEL, ROWS, claim, counters_of, product

# Rows of a panel that are multiplied with every row before the next ones: they stay in the L2.
_DEPTH = 2048
# Rows of x that a thread takes on at a time.
_TALL = 16 * ROWS


@njit(fastmath=FASTMATH, nogil=True, cache=True)
def _multiply_panel(x, row0, rows, panels, p, bias, out, scratch):
    """Fills out[row0 : row0 + rows] for the columns of panel p."""
    depth, width = x.shape[1], out.shape[1]
    flat_x, flat_out = x.reshape(-1), out.reshape(-1)
    column = p * PANEL
    columns = min(PANEL, width - column)
    for k in range(0, depth, _DEPTH):
        n = min(_DEPTH, depth - k)
        weights = (p * depth + k) * PANEL
        if columns == PANEL:
            product(
                rows, PANEL, flat_x, row0 * depth + k, depth, panels, weights, PANEL, n,
                flat_out, row0 * width + column, width, k, 0,
            )  # fmt: skip
        else:
            product(
                rows, PANEL, flat_x, row0 * depth + k, depth, panels, weights, PANEL, n,
                scratch, 0, PANEL, k, 0,
            )  # fmt: skip
    if columns < PANEL:
        for r in range(rows):
            for c in range(columns):
                out[row0 + r, column + c] = scratch[r * PANEL + c]
    if bias.size > 0:
        for r in range(row0, row0 + rows):
            for c in range(column, column + columns):
                out[r, c] += bias[c]


@njit(fastmath=FASTMATH, nogil=True, cache=True)
def _multiply_some(counters, thread, x, panels, bias, out):
    """Multiplies panels with tall parts of x, one after the other, until all are taken."""
    num_panels = -(-out.shape[1] // PANEL)
    num_rows = x.shape[0]
    num_items = num_panels * -(-num_rows // _TALL)
    scratch = np.empty(_TALL * PANEL, np.float32)
    item = claim(counters, thread, num_items)
    while item < num_items:
        row0 = item // num_panels * _TALL
        rows = min(_TALL, num_rows - row0)
        _multiply_panel(x, row0, rows, panels, item % num_panels, bias, out, scratch)
        item = claim(counters, thread, num_items)


@njit(fastmath=FASTMATH, nogil=True, parallel=True, cache=True)
def _multiply(num_threads, x, panels, bias, out):
    counters = counters_of(num_threads)
    for thread in prange(num_threads):
        _multiply_some(counters, thread, x, panels, bias, out)


class PackedLinear(nn.Module):
    """x @ weight.T + bias, read panel by panel: PANEL outputs side by side for each input.

    A row's result has the same bits whatever the number of rows: each output is one chain of
    fused multiply-adds in the order of the inputs. For the few rows of a decode step it runs at
    the speed of memory, where oneDNN's packed product takes up to twice as long.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """`weight` is [out_features, in_features]."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        num_panels = -(-self.out_features // PANEL)
        padded = torch.zeros(num_panels * PANEL, self.in_features)
        padded[: self.out_features] = weight
        panels = padded.view(num_panels, PANEL, self.in_features).transpose(1, 2)
        self._panels: np.ndarray[Any, Any] = panels.contiguous().numpy().reshape(-1)
        self._bias = np.zeros(0, np.float32) if bias is None else bias.float().numpy().copy()

    def forward(self, x: Tensor) -> Tensor:
        """Takes [..., in_features], returns [..., out_features]."""
        rows = x.reshape(-1, self.in_features).contiguous()
        out = torch.empty(len(rows), self.out_features)
        _multiply(numba.get_num_threads(), rows.numpy(), self._panels, self._bias, out.numpy())
        return out.view(*x.shape[:-1], self.out_features)
