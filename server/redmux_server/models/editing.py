"""Apply RED edits to the outputs of a running model, each row with its own adapter."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from redmux_adapters.bases.sites import LAYER_NORM
from redmux_server.engine.bank import IDENTITY, SiteColumns
from redmux_server.engine.request import Work
from redmux_server.models.layer_norm import normalise


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
    """The adapters of one step by reference: row `rows[t]` of the bank's table edits token t."""

    table: Tensor  # [rows, width]
    rows: NDArray[np.int32]  # [tokens]


def slots_of(work: Sequence[Work], edited: Sequence[range]) -> list[int]:
    """Returns the bank's slot of each item's adapter, IDENTITY where none edits its tokens.

    `edited` is `Work.edited` of each.
    """
    return [
        item.request.slot if some and item.request.slot is not None else IDENTITY
        for item, some in zip(work, edited, strict=True)
    ]


def rows_of_tokens(
    rows: Sequence[int], counts: Sequence[int], edited: Sequence[range]
) -> NDArray[np.int32]:
    """Returns the row of the bank's table for each token, 0 for one that is not edited.

    Request i has `counts[i]` tokens, of which row `rows[i]` edits `edited[i]`.
    """
    of_tokens = np.repeat(np.array(rows, np.int32), counts)
    start = 0
    for count, some in zip(counts, edited, strict=True):
        if 0 < len(some) < count:
            of_tokens[start : start + some.start] = 0
            of_tokens[start + some.stop : start + count] = 0
        start += count
    return of_tokens


class Editing:
    """Edits h' = scale * h + bias at the output of every site that some adapter uses.

    One forward hook per site; sites without a hook cost nothing. Hooks run on whatever module
    stands at the path, so quantised, packed or fused linears need nothing special. Everything
    uses the one arithmetic form `addcmul(bias, h, scale)`: another form has other bits. The
    LayerNorm of adapters that have one there follows in the same hook.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._columns: dict[str, SiteColumns] = {}
        self._hooks: dict[str, RemovableHandle] = {}
        self._step: StepRows | TableRows | None = None
        # Views of the step's rows, made anew only when the composition of the batch changes.
        self._rows: Tensor | None = None
        self._vectors: dict[str, tuple[Tensor, Tensor]] = {}  # site -> scale, bias [requests, dim]
        self._switches: dict[str, Tensor] = {}  # LayerNorm -> whether a request has it [requests]

    def install(self, layout: Mapping[str, SiteColumns]) -> None:
        """Hooks the sites of `layout` that have no hook yet, and takes over its columns."""
        if layout == self._columns:
            return
        for path in {path.removesuffix(LAYER_NORM) for path in layout} - self._hooks.keys():
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
            self._switches = {
                path: c.switch_of(rows.rows) for path, c in self._columns.items() if c.is_norm
            }
        try:
            yield
        finally:
            self._step = None

    def edit(self, path: str, output: Tensor) -> Tensor:
        """Edits in place what the module at `path` would put out, for code that does not call it.

        As a hook does: nothing happens outside a step, or where nobody edits.
        """
        if path not in self._hooks or self._step is None:
            return output
        norm = path + LAYER_NORM
        if isinstance(self._step, TableRows):
            h = output.view(-1, output.shape[-1])
            if path in self._columns:
                self._step.edit(h, self._step.table, self._step.rows, self._columns[path])
            if norm in self._columns:
                _normalise_by_table(h, self._step, self._columns[norm])
        else:
            if path in self._columns:
                _edit(output, *self._vectors[path], self._step)
            if norm in self._columns:
                _normalise(output, *self._vectors[norm], self._switches[norm], self._step)
        return output

    def _hook(self, path: str):  # type: ignore[no-untyped-def]
        def apply(module: nn.Module, args: object, output: Tensor) -> Tensor:
            return self.edit(path, output)

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


def _normalise(
    output: Tensor, weight: Tensor, bias: Tensor, switches: Tensor, step: StepRows
) -> None:
    """Normalises an edited output in the rows of the adapters that say so."""
    h = output.view(-1, weight.shape[1])
    n = step.num_decodes
    if n:
        normalise(h[:n], weight[:n], bias[:n], switches[:n])
    for start, stop, row in step.prefills:
        normalise(h[start:stop], weight[row], bias[row], switches[row : row + 1])


def _normalise_by_table(h: Tensor, step: TableRows, columns: SiteColumns) -> None:
    """The same from the bank's own table, without a look at its values from the host."""
    weight, bias = (part(step.table) for part in (columns.scale_of, columns.bias_of))
    normalise(
        h, weight.index_select(0, step.rows), bias.index_select(0, step.rows),
        columns.switch_of(step.table).index_select(0, step.rows),
    )  # fmt: skip
