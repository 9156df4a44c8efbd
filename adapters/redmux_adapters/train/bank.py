"""VectorBank: the vectors of K adapters under training as rows, applied row by row of a batch."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from ..bases.sites import LAYER_NORM
from ..format.adapter import Edit

# (h, shift, bias, owners) to h * (1 + shift) + bias, each with the values of its owner.
_Scaled = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
_EPS = 1e-5  # of the LayerNorm behind an edit, as servers compute it


@dataclass(frozen=True, slots=True)
class Owners:
    """Which adapter edits each token of packed examples, and whether it does; None: all do."""

    adapters: Tensor  # [tokens]
    inside: Tensor | None = None  # [tokens] of bool

    def __getitem__(self, places: Tensor) -> "Owners":
        inside = None if self.inside is None else self.inside[places]
        return Owners(self.adapters[places], inside)


class VectorBank:
    """fp32 scales and biases of K adapters at all sites, with their gradients.

    While `editing` a batch, the output h of a site becomes h * scale + bias in the batch's rows,
    each with the scale and bias of its own adapter; gradients land in that adapter's row alone,
    whatever another row holds. What is kept is scale - 1 and bias, both 0 at the start, so that
    small steps lose nothing to rounding and weight decay leads to no edit. A site that ends in
    `.activation_ln` is the LayerNorm behind the edit: its values are weight - 1 and bias, and only
    the rows normalise there whose adapters have that site.

    Belongs to one thread. `close` takes the edits off the model.
    """

    def __init__(self, model: nn.Module, sites: Mapping[str, int], num_adapters: int) -> None:
        self.sites = dict(sorted(sites.items()))
        width = 2 * sum(self.sites.values())
        device = next(model.parameters()).device
        self.values = torch.zeros(num_adapters, width, device=device)  # [K, all sites' values]
        self.grads = torch.zeros_like(self.values)
        self._rows: Tensor | None = None  # of the batch that is computed, [batch]
        self._inside: Tensor | None = None  # which of its tokens are edited, [batch, positions]
        self._places: dict[str, tuple[slice, slice]] = {}
        # Of each LayerNorm, which adapters have it, [K] of bool.
        self._has_norm: dict[str, Tensor] = {}
        self._leaves: dict[str, tuple[Tensor, Tensor]] = {}
        start = 0
        for site, dim in self.sites.items():
            scale, bias = slice(start, start + dim), slice(start + dim, start + 2 * dim)
            self._places[site] = scale, bias
            self._leaves[site] = self._leaf(scale), self._leaf(bias)
            if site.endswith(LAYER_NORM):
                self._has_norm[site] = torch.zeros(num_adapters, dtype=torch.bool, device=device)
            start += 2 * dim
        self._handles = [
            model.get_submodule(path).register_forward_hook(self._hook(path))
            for path in dict.fromkeys(site.removesuffix(LAYER_NORM) for site in self.sites)
        ]

    def close(self) -> None:
        """Removes the edits from the model."""
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def editing(self, rows: Tensor, inside: Tensor | None = None) -> Iterator[None]:
        """Edits what the model computes inside the block; `rows` [batch] names the adapters.

        `inside` [batch, positions] of bool tells which tokens are edited; None is all of them.
        """
        self._rows, self._inside = rows, inside
        try:
            yield
        finally:
            self._rows = self._inside = None

    def edited(self, path: str, h: Tensor, owners: Owners) -> Tensor:
        """Returns a module's output [tokens, dim], edited in fp32 if it is a site, else as it is.

        For what computes without the module.
        """
        if path not in self._leaves and path + LAYER_NORM not in self._leaves:
            return h
        h = h.float()
        edited = self._apply(path, h, owners.adapters, _ScaledTokens.apply)
        return edited if owners.inside is None else torch.where(owners.inside[:, None], edited, h)

    def normalise(self, row: int, sites: Mapping[str, int]) -> None:
        """Lets an adapter normalise behind those of its sites that have a LayerNorm."""
        for site in sites:
            if site in self._has_norm:
                self._has_norm[site][row] = True

    @torch.no_grad()
    def take(self, row: int, edits: Mapping[str, Edit]) -> None:
        """Sets an adapter's values to those of edits at some of the sites."""
        for site, edit in edits.items():
            scale, bias = self._places[site]
            self.values[row, scale] = (edit.scale - 1).to(self.values)
            self.values[row, bias] = edit.bias.to(self.values)

    def mask(self, sites: Mapping[str, int], part: str) -> Tensor:
        """Returns which values [all sites' values] are trained: of these sites, of this part."""
        mask = torch.zeros(self.values.shape[1], dtype=torch.bool, device=self.values.device)
        for site in sites:
            scale, bias = self._places[site]
            mask[scale] = part in ("both", "scale", "ln")
            mask[bias] = part in ("both", "bias", "ln")
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

    def _hook(self, path: str) -> Callable[[nn.Module, Any, Any], Any]:
        def edit(_module: nn.Module, _args: Any, h: Any) -> Any:
            if isinstance(h, tuple):  # T5's attentions put out their biases as well
                return edit(_module, _args, h[0]), *h[1:]
            rows = self._rows
            if rows is None:
                return h
            # Some models fold batch and positions into one axis before their FFN.
            shaped = h.reshape(len(rows), -1, h.shape[-1]).float()
            edited = self._apply(path, shaped, rows, _scaled)
            if self._inside is not None:
                edited = torch.where(self._inside[:, :, None], edited, shaped)
            return edited.to(h.dtype).view(h.shape)

        return edit

    def _apply(self, path: str, h: Tensor, owners: Tensor, scaled: _Scaled) -> Tensor:
        own, norm = self._leaves.get(path), self._leaves.get(path + LAYER_NORM)
        if own is not None:
            h = scaled(h, *own, owners)
        if norm is not None:
            normed = scaled(F.layer_norm(h, h.shape[-1:], eps=_EPS), *norm, owners)
            has_norm = self._has_norm[path + LAYER_NORM][owners]
            h = torch.where(has_norm.view(-1, *(1,) * (h.dim() - 1)), normed, h)
        return h


def _scaled(h: Tensor, shift: Tensor, bias: Tensor, rows: Tensor) -> Tensor:
    """Returns h [batch, positions, dim] times 1 + shift, plus bias, of each row's own adapter."""
    scale = (1 + shift.index_select(0, rows))[:, None]  # [batch, 1, dim]
    return torch.addcmul(bias.index_select(0, rows)[:, None], h, scale)


class _ScaledTokens(Function):
    """h [tokens, dim] times 1 + shift, plus bias, of each token's own adapter.

    Unlike what autograd would do, no row of a token is held for the gradients.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, shift: Tensor, bias: Tensor, owners: Tensor) -> Tensor:
        ctx.save_for_backward(h, shift, owners)
        return torch.addcmul(bias.index_select(0, owners), h, (1 + shift).index_select(0, owners))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, shift, owners = ctx.saved_tensors
        in_shift, in_bias = torch.zeros_like(shift), torch.zeros_like(shift)
        in_shift.index_add_(0, owners, grad * h)
        in_bias.index_add_(0, owners, grad)
        in_h = (1 + shift).index_select(0, owners).mul_(grad) if ctx.needs_input_grad[0] else None
        return in_h, in_shift, in_bias, None
