"""What products of few rows a model can have on its device; see `triton_products`."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from redmux_server.models.triton_products import FewRowProducts


def few_row_products(model: Any) -> "tuple[Mapping[str, FewRowProducts], str | None]":
    """Returns the kinds of them by name for a fusable model on a CUDA device, and why not all.

    Without Triton, or with one that is too old, there are none.
    """
    try:
        from redmux_server.models.triton_products import LARGEST_FP16_NORM, FewRowProducts
        from redmux_server.models.triton_tiles import Device
    except ImportError as err:
        return {}, str(err)
    if model.dtype == torch.float16 and _largest_norm(model) > LARGEST_FP16_NORM:
        return {}, f"weights of its norms are over {LARGEST_FP16_NORM:g}, which may overflow fp16"
    device = Device.of(model.device)
    hidden, eps = model.config.hidden_size, float(model.model.norm.variance_epsilon)
    kinds = {"few-row products": FewRowProducts(hidden, eps, model.dtype, device)}
    if not device.launches_early:
        return kinds, None
    early = FewRowProducts(hidden, eps, model.dtype, device, early=True)
    return {**kinds, "few-row products launched early": early}, None


def _largest_norm(model: Any) -> float:
    norms = [
        norm.weight
        for layer in model.model.layers
        for norm in (layer.input_layernorm, layer.post_attention_layernorm)
    ]
    return float(torch.stack(norms).abs().max())
