"""Apply RED edits to the outputs of a running model, each row with its own adapter."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class StepRows:
    """The adapters of one step.

    `rows` is [requests, width]: row i holds the vectors of the step's i-th request. The first
    `num_decodes` tokens belong to one request each; `prefills` are (start, stop, row) of the rest.
    """

    rows: Tensor
    num_decodes: int
    prefills: Sequence[tuple[int, int, int]]


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
        self._step: StepRows | None = None

    def install(self, layout: Mapping[str, SiteColumns]) -> None:
        """Hooks the sites of `layout` that have no hook yet, and takes over its columns."""
        for path in layout.keys() - self._hooks.keys():
            module = self._model.get_submodule(path)
            self._hooks[path] = module.register_forward_hook(self._hook(path))
        self._columns = dict(layout)

    def remove(self) -> None:
        """Takes every hook away again."""
        for handle in self._hooks.values():
            handle.remove()
        self._hooks = {}

    @contextmanager
    def step(self, rows: StepRows | None) -> Iterator[None]:
        """Makes the hooks apply these rows inside the block; None is the bare base model."""
        self._step = rows
        try:
            yield
        finally:
            self._step = None

    def _hook(self, path: str):  # type: ignore[no-untyped-def]
        def apply(module: nn.Module, args: object, output: Tensor) -> Tensor:
            if self._step is not None:
                self._apply(self._columns[path], output)
            return output

        return apply

    def _apply(self, columns: SiteColumns, output: Tensor) -> None:
        """Edits a module's fresh output [1, tokens, dim] or [tokens, dim] in place."""
        step = self._step
        assert step is not None
        h = output.view(-1, columns.dim)
        middle = columns.start + columns.dim
        scale = step.rows[:, columns.start : middle]  # [requests, dim]
        bias = step.rows[:, middle : columns.stop]
        n = step.num_decodes
        if n:
            torch.addcmul(bias[:n], h[:n], scale[:n], out=h[:n])
        for start, stop, row in step.prefills:
            torch.addcmul(bias[row], h[start:stop], scale[row], out=h[start:stop])
