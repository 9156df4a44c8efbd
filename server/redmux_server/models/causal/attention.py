"""Make a transformers model run its attention over our paged cache, or say why it cannot."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from redmux.errors import FailedPreconditionError
from redmux_server.models.kvcache import KVCache, LayerRule, LayerShape

_NAME = "redmux"


def _dispatch(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls; each module carries its own layer."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer = module.redmux_attention
    return layer(query, key, value, scale, sliding_window or 0, softcap or 0.0), None


class _Recorder:
    """Stands in for a layer during discovery: plain causal attention that notes its shapes."""

    def __init__(self) -> None:
        self.calls: list[tuple[LayerShape, LayerRule]] = []
        self.value_dim = 0

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int, softcap: float
    ) -> Tensor:
        shape = LayerShape(query.shape[1], key.shape[1], query.shape[3])
        self.calls.append((shape, LayerRule(scale, window, softcap)))
        self.value_dim = value.shape[3]
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=True
        )
        return out.transpose(1, 2)


def attention_modules(model: nn.Module) -> list[Any]:
    """Returns every self-attention module, in layer order."""
    found = [
        module
        for module in model.modules()
        if isinstance(getattr(module, "layer_idx", None), int) and hasattr(module, "is_causal")
    ]
    return sorted(found, key=lambda module: module.layer_idx)


def discover(model: Any) -> tuple[list[LayerShape], list[LayerRule]]:
    """Points the model at our attention function and returns shape and rule of each layer.

    Runs two tokens through the model and counts the calls. Some architectures accept a
    registered function and never call it, some use features that the cache does not have:
    both raise FailedPreconditionError with the reason, instead of answering wrongly later.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, _dispatch)
    kind = model.config.model_type
    expected = model.config.get_text_config().num_hidden_layers
    modules = attention_modules(model)
    recorders = [_Recorder() for _ in modules]
    for module, recorder in zip(modules, recorders, strict=True):
        module.redmux_attention = recorder
    try:
        model.set_attn_implementation(_NAME)
        with torch.inference_mode():
            ids = torch.tensor([[0, 1]], device=model.device)
            model(input_ids=ids, position_ids=torch.tensor([[0, 1]], device=ids.device),
                  use_cache=False)  # fmt: skip
    except (AttributeError, ValueError, TypeError) as err:
        raise FailedPreconditionError(
            f"architecture {kind!r} cannot be served: it does not run its attention through "
            f"transformers' attention interface ({err})"
        ) from err
    if len(modules) == expected and any(len(r.calls) > 1 for r in recorders):
        raise FailedPreconditionError(
            f"architecture {kind!r} cannot be served: a layer of it attends "
            f"{max(len(r.calls) for r in recorders)} times for each token; the cache holds the "
            f"keys and values of one time"
        )
    if len(modules) != expected or any(len(r.calls) != 1 for r in recorders):
        called = sum(bool(r.calls) for r in recorders)
        raise FailedPreconditionError(
            f"architecture {kind!r} cannot be served: {called} of its {expected} layers ran their "
            f"attention through transformers' attention interface"
        )
    if any(getattr(module, "sinks", None) is not None for module in modules):
        raise FailedPreconditionError(f"architecture {kind!r} uses attention sinks")
    for recorder in recorders:
        (shape, _), *_ = recorder.calls
        if shape.head_dim != recorder.value_dim:
            raise FailedPreconditionError(
                f"architecture {kind!r} cannot be served: a head of its keys has {shape.head_dim} "
                f"dimensions, one of its values {recorder.value_dim}; the cache takes equal ones"
            )
    shapes, rules = zip(*(recorder.calls[0] for recorder in recorders), strict=True)
    return list(shapes), list(rules)


def attach(model: nn.Module, cache: KVCache) -> None:
    """Gives each attention module its layer of the cache."""
    for module, layer in zip(attention_modules(model), cache.layers, strict=True):
        module.redmux_attention = layer
