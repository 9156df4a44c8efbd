"""VectorBank: the vectors of K adapters under training as rows, applied row by row of a batch."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..format.adapter import Edit


class VectorBank:
    """fp32 scales and biases of K adapters at all sites, with their gradients.

    While `editing` a batch, the output h of a site becomes h * scale + bias in the batch's rows,
    each with the scale and bias of its own adapter; gradients land in that adapter's row alone,
    whatever another row holds. What is kept is scale - 1 and bias, both 0 at the start, so that
    small steps lose nothing to rounding and weight decay leads to no edit.

    Belongs to one thread. `close` takes the edits off the model.
    """

    def __init__(self, model: nn.Module, sites: Mapping[str, int], num_adapters: int) -> None:
        self.sites = dict(sorted(sites.items()))
        width = 2 * sum(self.sites.values())
        device = next(model.parameters()).device
        self.values = torch.zeros(num_adapters, width, device=device)  # [K, all sites' values]
        self.grads = torch.zeros_like(self.values)
        self._rows: Tensor | None = None  # of the batch that is computed, [batch]
        self._places: dict[str, tuple[slice, slice]] = {}
        self._handles = []
        start = 0
        for site, dim in self.sites.items():
            self._places[site] = slice(start, start + dim), slice(start + dim, start + 2 * dim)
            leaves = [self._leaf(place) for place in self._places[site]]
            module = model.get_submodule(site)
            self._handles.append(module.register_forward_hook(self._hook(*leaves)))
            start += 2 * dim

    def close(self) -> None:
        """Removes the edits from the model."""
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def editing(self, rows: Tensor) -> Iterator[None]:
        """Edits what the model computes inside the block; `rows` [batch] names the adapters."""
        self._rows = rows
        try:
            yield
        finally:
            self._rows = None

    def mask(self, sites: Mapping[str, int], part: str) -> Tensor:
        """Returns which values [all sites' values] are trained: of these sites, of this part."""
        mask = torch.zeros(self.values.shape[1], dtype=torch.bool, device=self.values.device)
        for site in sites:
            scale, bias = self._places[site]
            mask[scale] = part in ("both", "scale")
            mask[bias] = part in ("both", "bias")
        return mask

    def edits(self, values: Tensor, sites: Mapping[str, int]) -> dict[str, Edit]:
        """Returns the edits that a row of values [all sites' values] stands for, at `sites`."""
        places = {site: self._places[site] for site in sites}
        return {
            site: Edit(1 + values[scale], values[bias]) for site, (scale, bias) in places.items()
        }

    def _leaf(self, place: slice) -> Tensor:
        leaf = self.values[:, place].detach().requires_grad_()  # [K, dim], the bank's own memory

        def collect(leaf: Tensor) -> None:
            assert leaf.grad is not None
            self.grads[:, place] += leaf.grad
            leaf.grad = None

        leaf.register_post_accumulate_grad_hook(collect)  # type: ignore[no-untyped-call]
        return leaf

    def _hook(self, shift: Tensor, bias: Tensor) -> Callable[[nn.Module, Any, Any], Any]:
        def edit(_module: nn.Module, _args: Any, h: Any) -> Any:
            if isinstance(h, tuple):  # T5's attentions put out their biases as well
                return edit(_module, _args, h[0]), *h[1:]
            rows = self._rows
            if rows is None:
                return h
            # Some models fold batch and positions into one axis before their FFN.
            by_row = h.reshape(len(rows), -1, h.shape[-1]).float()
            scale = (1 + shift.index_select(0, rows))[:, None]  # [batch, 1, dim]
            edited = torch.addcmul(bias.index_select(0, rows)[:, None], by_row, scale)
            return edited.to(h.dtype).view(h.shape)

        return edit
