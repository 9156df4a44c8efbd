"""What products of few rows a model can have on its device; see `triton_products`."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from redmux_server.models.cuda.triton_products import FewRowProducts


def few_row_products(model: Any) -> "tuple[Mapping[str, FewRowProducts], str | None]":
    """Returns the kinds of them by name for a fusable model on a CUDA device, and why not all.

    Without Triton, or with one that is too old, there are none.
    """
    try:
        from redmux_server.models.cuda.triton_products import LARGEST_FP16_NORM
    except ImportError as err:
        return {}, str(err)
    if model.dtype == torch.float16 and _largest_norm(model) > LARGEST_FP16_NORM:
        return {}, f"weights of its norms are over {LARGEST_FP16_NORM:g}, which may overflow fp16"
    eps = float(model.model.norm.variance_epsilon)
    return kinds(model.config.hidden_size, eps, model.dtype, model.device), None


def kinds(
    hidden: int, eps: float, dtype: torch.dtype, device: torch.device
) -> "Mapping[str, FewRowProducts]":
    """Returns those that this CUDA device can have, by name; raises ImportError without Triton."""
    from redmux_server.models.cuda.triton_products import FewRowProducts
    from redmux_server.models.cuda.triton_tiles import Device

    limits = Device.of(device)
    found = {"few-row products": FewRowProducts(hidden, eps, dtype, limits)}
    if limits.launches_early:
        early = FewRowProducts(hidden, eps, dtype, limits, early=True)
        found["few-row products launched early"] = early
    return found


def _largest_norm(model: Any) -> float:
    norms = [
        norm.weight
        for layer in model.model.layers
        for norm in (layer.input_layernorm, layer.post_attention_layernorm)
    ]
    return float(torch.stack(norms).abs().max())
