"""IA3 of the PEFT library: scales of outputs, and of the inputs of feed-forward projections."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from redmux.errors import InvalidAdapterError

from ..bases.architectures import Stack
from ..bases.sites import site_path
from ..format.adapter import Edit
from ..format.strictjson import shown
from .peft import IA3, PREFIX
from .target import Target, bare_path, check_length


class _Place(NamedTuple):
    """Where the input of a projection comes from, one value of an output each."""

    site: str
    num_before: int = 0  # outputs of the site that come before those and are left alone


def read_ia3(tensors: Mapping[str, Tensor], target: Target) -> dict[str, Edit]:
    """Returns scales that do what IA3 does, each at the output of a module.

    A scale [dim, 1] is of its module's output. One [1, dim] is of its input, and moves to whatever
    puts that out: the linear that a gate is multiplied with; the linear before a ReLU, where the
    scale is not negative; the projection to values, of which attention takes means; else the
    activation itself.
    """
    scales: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module = bare_path(name.removeprefix(PREFIX).removesuffix(IA3))
        scale = tensor.float().reshape(-1)
        place = _Place(module)
        if tensor.dim() == 2 and tensor.shape[0] == 1 and tensor.shape[1] > 1:
            place = _origin(module, scale, target)
        elif tensor.numel() != tensor.shape[0]:
            raise InvalidAdapterError(
                f"{shown(name)} has shape {list(tensor.shape)}; it has to be [outputs, 1] or "
                "[1, inputs]"
            )
        scale = torch.cat([torch.ones(place.num_before), scale])
        held = scales.setdefault(place.site, torch.ones_like(scale))
        if len(held) != len(scale):
            raise InvalidAdapterError(
                f"two scales come together at {shown(place.site)}, of {len(held)} and {len(scale)} "
                "values; they have to be the same"
            )
        scales[place.site] = scale * held
    return {site: Edit(scale, torch.zeros_like(scale)) for site, scale in scales.items()}


def _origin(module: str, scale: Tensor, target: Target) -> _Place:
    """Returns where the input of `module` comes from."""
    modules = target.modules("an IA3 adapter that scales inputs of feed-forward projections")
    for stack, layer in target.layers():
        if module == site_path(stack, layer, stack.ffn):
            return _of_ffn(stack, layer, scale, modules)
        attentions = [site_path(stack, layer, path) for path in stack.attn]
        if module in attentions and len(stack.qkv) == 3 * len(attentions):
            value = stack.qkv[3 * attentions.index(module) + 2]
            return _of_attention(module, site_path(stack, layer, value), scale, modules)
    raise InvalidAdapterError(
        f"IA3 scales the input of {shown(module)}, and that is the output of no known module of "
        f"{target.model_type!r} models"
    )


def _of_ffn(stack: Stack, layer: int, scale: Tensor, modules: Mapping[str, nn.Module]) -> _Place:
    up = site_path(stack, layer, stack.up)
    if stack.up and up in modules:
        return _Place(up, len(scale) if stack.up_is_second_half else 0)
    act = site_path(stack, layer, stack.act)
    if stack.before_act and isinstance(modules[act], nn.ReLU) and bool((scale >= 0).all()):
        return _Place(site_path(stack, layer, stack.before_act))
    return _Place(act)


def _of_attention(
    module: str, value: str, scale: Tensor, modules: Mapping[str, nn.Module]
) -> _Place:
    linear = modules[value]
    if not isinstance(linear, nn.Linear) or linear.out_features != len(scale):
        raise InvalidAdapterError(
            f"IA3 scales the {len(scale)} inputs of {shown(module)}; several heads of queries "
            "share one of values, so this is no scale of the values"
        )
    check_length(module, len(scale), linear.out_features)
    return _Place(value)
