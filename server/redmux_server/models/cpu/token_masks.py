"""What grammars bar, taken out of rows of logits by a kernel."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from redmux_server.engine.grammar import Bar, Mask, bar_tokens
from redmux_server.models.cpu.compiled import compiled


def choose_bar(device: torch.device, dtype: torch.dtype) -> Bar:
    """Returns what bars tokens of such logits, ready, so that no request waits for a compiler."""
    if device.type != "cpu" or dtype != torch.float32:
        return bar_tokens
    make_ready()
    return bar_in_memory


def make_ready() -> None:
    """Has the kernel compiled, or read from where it is kept."""
    _bar(np.zeros((1, 8), np.float32), np.zeros(1, np.int64), np.zeros((1, 1), np.uint8))


def bar_in_memory(logits: Tensor, rows: Sequence[int], masks: Sequence[Mask]) -> None:
    """Bars tokens as `Bar` has it, of contiguous float32 logits in memory."""
    packed = np.stack(masks)
    assert 8 * packed.shape[1] >= logits.shape[1]
    _bar(logits.numpy(), np.asarray(rows, np.int64), packed)


@compiled
def _bar(logits, rows, masks):
    """Takes infinity from logits [n, vocab] of rows [m] where the bits of masks [m, bytes] are 0.

    Whole bytes first, eight tokens without a branch, which become instructions of vectors.
    """
    none, infinity = np.float32(0), np.float32(np.inf)
    for i in range(rows.size):
        row, mask = logits[rows[i]], masks[i]
        num_whole = row.size // 8
        for b in range(num_whole):
            bits = np.int32(mask[b])
            for j in range(8):
                row[8 * b + j] -= none if (bits >> j) & 1 else infinity
        for t in range(8 * num_whole, row.size):
            row[t] -= none if (mask[t // 8] >> (t % 8)) & 1 else infinity
