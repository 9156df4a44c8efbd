"""A model's embeddings, in the smallest form that gives back each value as it is."""

import torch
from torch import Tensor

from redmux_server.models.cpu.block_kernel import BLOCK

_CHUNK = 4096  # rows


class Embeddings:
    """The rows of a table of fp32.

    A file of 8-bit weights has multiples of a step of fp16 for every BLOCK values, most checkpoints
    have bf16; what is neither stays in fp32.
    """

    def __init__(self, table: Tensor) -> None:
        """Copies `table` [rows, dim]."""
        self._steps: Tensor | None = None  # fp32 [rows, blocks, 1], where the table holds multiples
        multiples = _multiples(table)
        if multiples is not None:
            self._table, self._steps = multiples
        else:
            is_narrow = _is_bf16(table)
            self._table = table.bfloat16() if is_narrow else table.float().clone()

    @property
    def num_bytes(self) -> int:
        """The memory that it takes."""
        return self._table.nbytes + (0 if self._steps is None else self._steps.nbytes)

    def __call__(self, ids: Tensor) -> Tensor:
        """Returns the rows [len(ids), dim] in fp32."""
        rows = self._table[ids].float()
        return rows if self._steps is None else (rows * self._steps[ids]).flatten(1)


def _is_bf16(table: Tensor) -> bool:
    chunks = (table[first : first + _CHUNK] for first in range(0, len(table), _CHUNK))
    return all(torch.equal(chunk.bfloat16(), chunk) for chunk in chunks)


def _multiples(table: Tensor) -> tuple[Tensor, Tensor] | None:
    """Returns table as int8 [rows, blocks, BLOCK] times steps, or None if it is not that."""
    num_rows, dim = table.shape
    if dim % BLOCK:
        return None
    whole = torch.empty(num_rows, dim // BLOCK, BLOCK, dtype=torch.int8)
    steps = torch.empty(num_rows, dim // BLOCK, 1)
    for first in range(0, num_rows, _CHUNK):
        some = slice(first, first + _CHUNK)
        blocks = table[some].float().reshape(-1, dim // BLOCK, BLOCK)
        steps[some] = (blocks.abs().amax(2, keepdim=True) / 127).half()
        found = (blocks / steps[some]).nan_to_num_(0).round_().clamp_(-127, 127)
        if not torch.equal(found * steps[some], blocks):
            return None
        whole[some] = found.to(torch.int8)
    return whole, steps
