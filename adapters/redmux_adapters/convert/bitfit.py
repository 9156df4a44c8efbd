"""BitFit: a model of which only the biases were trained, by its biases."""

from collections.abc import Mapping

import torch
from torch import Tensor

from redmux.errors import InvalidAdapterError

from ..bases.sites import addressable_sites
from ..format.adapter import Edit
from ..format.strictjson import shown
from .target import Target, bare_path, check_length


def read_bitfit(tensors: Mapping[str, Tensor], target: Target) -> dict[str, Edit]:
    """Returns the differences to the base model's biases, as biases of edits.

    A linear without a bias had one of zeros. Biases that did not change make no edit.
    """
    modules = target.modules("a file of trained biases")
    assert target.model is not None
    sites = addressable_sites(target.model)
    edits = {}
    for name, tensor in tensors.items():
        site = bare_path(name.removesuffix(".bias"))
        if site not in sites:
            raise InvalidAdapterError(
                f"{shown(name)} is the bias of no linear module or norm in the base model's layers"
            )
        bias = tensor.float().reshape(-1)
        check_length(name, len(bias), sites[site])
        base = getattr(modules[site], "bias", None)
        if base is not None:
            bias = bias - base.detach().float()
        if bias.any():
            edits[site] = Edit(torch.ones_like(bias), bias)
    if not edits:
        raise InvalidAdapterError("the file's biases are those of the base model; nothing to edit")
    return edits
