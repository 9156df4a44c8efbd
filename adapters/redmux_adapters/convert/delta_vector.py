"""The vectors of the RED authors' code (mlwu22/RED): `delta_vector.pth`, RED and RED++."""

from collections.abc import Mapping

import torch
from torch import Tensor

from redmux.errors import InvalidAdapterError

from ..adapter import Edit
from ..strictjson import shown

MARK = ".delta_vector."
_KINDS = {"activation_scaling": "scale", "activation_bias": "bias"}
_WRAPPERS = ("module.", "base_model.")  # DataParallel's and the authors' own wrapper class


def read_delta_vector(tensors: Mapping[str, Tensor]) -> dict[str, Edit]:
    """Returns the edits of `<module path>.delta_vector.activation_{scaling,bias}`, each [1, dim].

    The variant "ln", which normalises what it has edited, is refused: mean and variance depend on
    the token, and an edit does not.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        site, _, ending = name.partition(MARK)
        if ending.startswith("activation_ln."):
            raise InvalidAdapterError(
                f"{shown(name)} is of RED's variant 'ln', a LayerNorm after the edit; its "
                "mean and variance depend on the token, so it is no scale and bias"
            )
        if ending not in _KINDS:
            raise InvalidAdapterError(
                f"unexpected entry {shown(name)}; names end in {MARK}activation_scaling or "
                f"{MARK}activation_bias"
            )
        if tensor.numel() != tensor.shape[-1]:
            raise InvalidAdapterError(
                f"{shown(name)} has shape {list(tensor.shape)}; it has to be [1, hidden size]"
            )
        while site.startswith(_WRAPPERS):
            site = site.partition(".")[2]
        vectors, kind = found.setdefault(site, {}), _KINDS[ending]
        if kind in vectors:
            raise InvalidAdapterError(f"'{site}.{kind}' occurs twice, under different prefixes")
        vectors[kind] = tensor.reshape(-1).float()
    return {site: _edit(vectors) for site, vectors in found.items()}


def _edit(vectors: Mapping[str, Tensor]) -> Edit:
    some = next(iter(vectors.values()))
    scale = vectors.get("scale", torch.ones_like(some))
    return Edit(scale, vectors.get("bias", torch.zeros_like(some)))
