"""Adapters of the PEFT library whose methods are scales and biases: IA3, BEFT and LN tuning."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from redmux.errors import InvalidAdapterError

from ..bases.sites import is_norm
from ..format.adapter import Edit
from ..format.strictjson import shown
from .target import Target, bare_path, check_length

PREFIX = "base_model.model."
IA3, BEFT, NORM = ".ia3_l", ".beft_bias", ".ln_tuning_layers."


def read_beft(tensors: Mapping[str, Tensor]) -> dict[str, Edit]:
    """Returns the biases that BEFT adds to the outputs of linear modules."""
    edits = {}
    for name, tensor in tensors.items():
        site = bare_path(name.removeprefix(PREFIX).removesuffix(BEFT))
        bias = tensor.float().reshape(-1)
        edits[site] = Edit(torch.ones_like(bias), bias)
    return edits


def read_norms(tensors: Mapping[str, Tensor], target: Target) -> dict[str, Edit]:
    """Returns the edits that turn the base model's norms into those that LN tuning has trained.

    With n the normalised input, the base model puts out y = w n + b, the tuned one w' n + b', which
    is (w'/w) y + (b' - b w'/w): an edit at the norm's own output.
    """
    modules = target.modules("an adapter of LN tuning")
    edits = {}
    for name in tensors:
        stem, _, kind = name.partition(NORM)
        site = bare_path(stem.removeprefix(PREFIX))
        norm = modules.get(site)
        if norm is None or not is_norm(norm) or kind not in ("weight", "bias"):
            raise InvalidAdapterError(
                f"{shown(name)} is for no norm of the base model, which has no norm "
                f"{shown(site)} with a {shown(kind)}"
            )
        # Gemma keeps its weights less 1.
        offset = 1.0 if target.model_type.startswith("gemma") else 0.0
        edits[site] = _norm_edit(
            site,
            norm,
            tensors.get(f"{stem}{NORM}weight"),
            tensors.get(f"{stem}{NORM}bias"),
            offset,
        )
    return edits


def _norm_edit(
    site: str, norm: nn.Module, weight: Tensor | None, bias: Tensor | None, offset: float
) -> Edit:
    old = norm.weight.detach().double() + offset  # type: ignore[operator]
    new = old if weight is None else weight.double() + offset
    check_length(f"{site}.weight", new.numel(), old.numel())
    lost = (old == 0) & (new != 0)
    if lost.any():
        raise InvalidAdapterError(
            f"the base model's weight of {shown(site)} is 0 at index {int(lost.nonzero()[0])}: its "
            "output there is lost and no scale brings it back"
        )
    scale = torch.where(old == 0, 1.0, new / old)
    base_bias = getattr(norm, "bias", None)
    shift = torch.zeros_like(old) if base_bias is None else base_bias.detach().double()
    trained = shift if bias is None else bias.double()
    check_length(f"{site}.bias", trained.numel(), old.numel())
    return Edit(scale.float(), (trained - shift * scale).float())
