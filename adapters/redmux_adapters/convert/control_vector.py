"""Control vectors of llama.cpp and repeng: a vector per layer, added to the residual stream."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from redmux.errors import InvalidAdapterError

from ..bases.architectures import stacks_of
from ..bases.sites import site_path
from ..format.adapter import Edit
from ..format.strictjson import shown

_NAME = re.compile(r"direction\.(0|[1-9][0-9]{0,3})")


def is_direction(name: str) -> bool:
    """Whether `name` is that of a control vector's tensor."""
    return _NAME.fullmatch(name) is not None


def read_control_vector(
    tensors: Mapping[str, Tensor], model_type: str, strength: float
) -> dict[str, Edit]:
    """Returns the biases that do what `direction.<layer>` does: h + strength * direction.

    The vector is added to the sum at the end of its layer (counted from 0). Where that sum has the
    FFN's output as one of its terms, adding there is the same. Raises InvalidAdapterError for
    architectures where something lies between the two.
    """
    stacks = stacks_of(model_type)
    if len(stacks) != 1 or not stacks[0].adds_ffn:
        raise InvalidAdapterError(
            f"a control vector is no edit of {model_type!r} models: between the FFN's output and "
            "the residual stream lies a norm or a factor, or it does so in some checkpoints"
        )
    edits = {}
    for name, tensor in tensors.items():
        if not is_direction(name):
            raise InvalidAdapterError(f"unexpected entry {shown(name)}; names are 'direction.<n>'")
        if tensor.dim() != 1:
            raise InvalidAdapterError(
                f"{shown(name)} has shape {list(tensor.shape)}; it has to be [hidden size]"
            )
        layer = int(name.partition(".")[2])
        bias = strength * tensor.float()
        edits[site_path(stacks[0], layer, stacks[0].ffn)] = Edit(torch.ones_like(bias), bias)
    return edits
