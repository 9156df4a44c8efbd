"""Apply RED edits to the outputs of a running model, each row with its own adapter."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True, slots=True)
class SiteColumns:
    """Where a site's vectors lie in a row of the adapter bank."""

    start: int
    dim: int

    @property
    def stop(self) -> int:
        """One past the last column."""
        return self.start + 2 * self.dim

    def scale_of(self, rows: Tensor) -> Tensor:
        """Returns the scales [requests, dim] in rows [requests, width]."""
        return rows[:, self.start : self.start + self.dim]

    def bias_of(self, rows: Tensor) -> Tensor:
        """Returns the biases [requests, dim] in rows [requests, width]."""
        return rows[:, self.start + self.dim : self.stop]


@dataclass(frozen=True, slots=True)
class StepRows:
    """The adapters of one step.

    `rows` is [requests, width]: row i holds the vectors of the step's i-th request. The first
    `num_decodes` tokens belong to one request each; `prefills` are (start, stop, row) of the rest.
    """

    rows: Tensor
    num_decodes: int
    prefills: Sequence[tuple[int, int, int]]


class RowEdit(Protocol):
    """What edits tokens by rows of the bank's table; see `row_edit`."""

    def __call__(self, h: Tensor, table: Tensor, rows: Tensor, columns: SiteColumns) -> None:
        """Makes h[t] = scale * h[t] + bias in place, with the vectors of row rows[t].

        h is [tokens, dim], table [bank rows, width], rows [tokens] int32; row 0 is the identity.
        """


@dataclass(frozen=True, slots=True)
class TableRows:
    """The adapters of one step where the bank's own table is read: rows are data, not a copy.

    So a captured CUDA graph serves any mix of adapters, by writing other numbers into `rows`.
    """

    table: Tensor  # [bank rows, width]
    rows: Tensor  # [tokens] int32
    edit: RowEdit


@dataclass(frozen=True, slots=True)
class OwnedRows:
    """The adapters of one step by reference: request i owns row `owners[i]` of the bank's table."""

    table: Tensor  # [rows, width]
    owners: Sequence[int]


class Editing:
    """Edits h' = scale * h + bias at the output of every site that some adapter uses.

    One forward hook per site; sites without a hook cost nothing. Hooks run on whatever module
    stands at the path, so quantised, packed or fused linears need nothing special. Everything
    uses the one arithmetic form `addcmul(bias, h, scale)`: another form has other bits.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._columns: dict[str, SiteColumns] = {}
        self._hooks: dict[str, RemovableHandle] = {}
        self._step: StepRows | TableRows | None = None
        # Views of the step's rows, made anew only when the composition of the batch changes.
        self._rows: Tensor | None = None
        self._vectors: dict[str, tuple[Tensor, Tensor]] = {}  # site -> scale, bias [requests, dim]

    def install(self, layout: Mapping[str, SiteColumns]) -> None:
        """Hooks the sites of `layout` that have no hook yet, and takes over its columns."""
        if layout == self._columns:
            return
        for path in layout.keys() - self._hooks.keys():
            module = self._model.get_submodule(path)
            self._hooks[path] = module.register_forward_hook(self._hook(path))
        self._columns = dict(layout)
        self._rows = None

    def remove(self) -> None:
        """Takes every hook away again."""
        for handle in self._hooks.values():
            handle.remove()
        self._hooks = {}
        self._columns = {}

    @contextmanager
    def step(self, rows: StepRows | TableRows | None) -> Iterator[None]:
        """Makes the hooks apply these rows inside the block; None is the bare base model."""
        self._step = rows
        if isinstance(rows, StepRows) and rows.rows is not self._rows:
            self._rows = rows.rows
            self._vectors = {
                path: (c.scale_of(rows.rows), c.bias_of(rows.rows))
                for path, c in self._columns.items()
            }
        try:
            yield
        finally:
            self._step = None

    def _hook(self, path: str):  # type: ignore[no-untyped-def]
        def apply(module: nn.Module, args: object, output: Tensor) -> Tensor:
            if isinstance(self._step, TableRows):
                columns = self._columns[path]
                h = output.view(-1, columns.dim)
                self._step.edit(h, self._step.table, self._step.rows, columns)
            elif self._step is not None:
                _edit(output, *self._vectors[path], self._step)
            return output

        return apply


def _edit(output: Tensor, scale: Tensor, bias: Tensor, step: StepRows) -> None:
    """Edits a module's fresh output [1, tokens, dim] or [tokens, dim] in place."""
    h = output.view(-1, scale.shape[1])
    n = step.num_decodes
    if n == h.shape[0]:
        torch.addcmul(bias, h, scale, out=h)
        return
    if n:
        torch.addcmul(bias[:n], h[:n], scale[:n], out=h[:n])
    for start, stop, row in step.prefills:
        torch.addcmul(bias[row], h[start:stop], scale[row], out=h[start:stop])
