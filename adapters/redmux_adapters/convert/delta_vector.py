"""The vectors of the RED authors' code (mlwu22/RED): `delta_vector.pth`, RED and RED++."""

from collections.abc import Mapping

import torch
from torch import Tensor

from redmux.errors import InvalidAdapterError

from ..bases.sites import LAYER_NORM
from ..format.adapter import Edit
from ..format.strictjson import shown

MARK = ".delta_vector."
# The ending of an entry: of which site, counted from the edited module, it is which vector.
_KINDS = {
    "activation_scaling": ("", "scale"),
    "activation_bias": ("", "bias"),
    "activation_ln.weight": (LAYER_NORM, "scale"),
    "activation_ln.bias": (LAYER_NORM, "bias"),
}
_WRAPPERS = ("module.", "base_model.")  # DataParallel's and the authors' own wrapper class


def read_delta_vector(tensors: Mapping[str, Tensor]) -> dict[str, Edit]:
    """Returns the edits of `<module path>.delta_vector.activation_{scaling,bias}`, each [1, dim].

    The variant "ln" has a LayerNorm besides, `activation_ln.{weight,bias}`, each [dim], which
    becomes a site of its own behind that of the edit.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        site, _, ending = name.partition(MARK)
        if ending not in _KINDS:
            raise InvalidAdapterError(
                f"unexpected entry {shown(name)}; names end in one of "
                f"{', '.join(MARK + kind for kind in _KINDS)}"
            )
        if tensor.numel() != tensor.shape[-1]:
            raise InvalidAdapterError(
                f"{shown(name)} has shape {list(tensor.shape)}; it has to be [1, hidden size]"
            )
        while site.startswith(_WRAPPERS):
            site = site.partition(".")[2]
        end, kind = _KINDS[ending]
        site += end
        vectors = found.setdefault(site, {})
        if kind in vectors:
            raise InvalidAdapterError(f"'{site}.{kind}' occurs twice, under different prefixes")
        vectors[kind] = tensor.reshape(-1).float()
    return {site: _edit(site, vectors) for site, vectors in found.items()}


def _edit(site: str, vectors: Mapping[str, Tensor]) -> Edit:
    some = next(iter(vectors.values()))
    scale = vectors.get("scale", torch.ones_like(some))
    bias = vectors.get("bias", torch.zeros_like(some))
    if len(scale) != len(bias):
        raise InvalidAdapterError(
            f"the scale of {shown(site)} has {len(scale)} values and its bias {len(bias)}; they "
            "have to be the same"
        )
    return Edit(scale, bias)
