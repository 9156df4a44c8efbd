"""Folds an adapter into the weights of its base model, so that plain transformers runs it."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from redmux.errors import InvalidAdapterError

from .bases.architectures import Stack, is_known, stacks_of
from .bases.fingerprint import fingerprint
from .bases.sites import LAYER_NORM, addressable_sites, is_norm, site_path, with_layer_norms
from .format.adapter import Adapter, Edit, check_base
from .format.files import check_sites
from .format.head import Head
from .format.strictjson import shown
from .format.window import ALL

# What configurations call the biases that their linear modules may have or not.
_BIAS_SWITCHES = ("attention_bias", "mlp_bias", "enable_bias")
# The architectures whose own class for sequence classification has a head of the kind.
_HEAD_CLASSES = {
    "roberta": ("mpnet", "roberta", "xlm-roberta"),
    "electra": ("electra",),
    "distilbert": ("distilbert",),
    "bert": ("bert",),
}


class _Step(NamedTuple):
    """One edit and the module whose weights take it."""

    module: str
    edit: Edit
    before: bool  # the edit is of the module's input


@torch.no_grad()
def fold(adapter: Adapter, model: Any, allow_other_base: bool = False) -> Any:
    """Returns `model` with the adapter's edits in its weights, or the same with its head.

    `model` is that of `load_any` and is changed. A linear W x + b edited by scale and bias is
    diag(scale) W x + (scale b + bias), and a norm likewise; an edited activation goes into the
    columns of the projection behind it. Where a module has no bias and the configuration has a
    switch for it, that is turned on, and the other modules that it gives a bias get one of zeros.

    Raises WrongBaseError as `check_base` does, and InvalidAdapterError where the architecture
    has no place for an edit or the head.
    """
    check_base(adapter, fingerprint(model), allow_other_base)
    if adapter.apply != ALL:
        raise InvalidAdapterError(
            f"the adapter edits {shown(adapter.apply)} alone, and weights act on every token; "
            "serve it instead"
        )
    check_sites(adapter.sites, with_layer_norms(addressable_sites(model)))
    modules = dict(model.named_modules())
    # A module acts before the block around it, which has the shorter path.
    sites = sorted(adapter.edits, key=lambda site: -site.count("."))
    steps = [_step(model, site, adapter.edits[site]) for site in sites]
    _add_biases(model, [step.module for step in steps if _lacks_bias(modules[step.module], step)])
    for step in steps:
        module = modules[step.module]
        if step.before:
            _fold_input(module, step.edit)
        elif is_norm(module):
            _fold_norm(module, step.edit, model.config.model_type)
        else:
            _fold_output(module, step.edit)
    return model if adapter.head is None else _with_head(model, adapter.head)


def _step(model: Any, site: str, edit: Edit) -> _Step:
    if site.endswith(LAYER_NORM):
        raise InvalidAdapterError(
            f"{shown(site)} is a LayerNorm behind an edit, whose mean and variance depend on the "
            "token, so no weight can hold it; serve the adapter instead"
        )
    modules = dict(model.named_modules())
    if is_norm(modules[site]) or _is_linear(modules[site]):
        return _Step(site, edit, before=False)
    for stack, layer in _layers(model):
        if stack.act and site == site_path(stack, layer, stack.act):
            return _Step(site_path(stack, layer, stack.ffn), edit, before=True)
    # The sum with the residual leaves its block through a norm where that comes after the sum.
    if f"{site}.LayerNorm" in modules:
        return _Step(f"{site}.LayerNorm", edit, before=False)
    raise InvalidAdapterError(
        f"{shown(site)} puts out the residual stream itself, which no weight of a "
        f"{model.config.model_type!r} model multiplies; serve the adapter instead"
    )


def _layers(model: Any) -> Iterator[tuple[Stack, int]]:
    if is_known(model.config.model_type):
        for stack in stacks_of(model.config.model_type):
            for layer in range(len(model.get_submodule(stack.layers))):
                yield stack, layer


def _is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def _lacks_bias(module: nn.Module, step: _Step) -> bool:
    return bool(step.edit.bias.any()) and getattr(module, "bias", None) is None


def _add_biases(model: Any, lacking: list[str]) -> None:
    """Gives the modules `lacking` biases of zeros, in the ways that the configuration has."""
    for switch in _BIAS_SWITCHES:
        if not lacking or getattr(model.config, switch, None) is not False:
            continue
        config = type(model.config)(**model.config.to_dict() | {switch: True})
        with torch.device("meta"):
            possible = dict(type(model)(config).named_parameters())
        new = [name for name in possible if name not in model.state_dict()]
        if not {f"{path}.bias" for path in lacking}.intersection(new):
            continue
        for name in new:
            bias = nn.Parameter(torch.zeros(possible[name].shape, dtype=model.dtype))
            model.get_submodule(name.rpartition(".")[0]).bias = bias
        setattr(model.config, switch, True)
        lacking = [path for path in lacking if f"{path}.bias" not in new]
    if lacking:
        raise InvalidAdapterError(
            f"{shown(lacking[0])} can have no bias in the {model.config.model_type!r} models of "
            "transformers, and the adapter's edit has one; serve the adapter instead"
        )


def _rows(module: Any) -> Tensor:
    """Returns the weight as a view [outputs, inputs]."""
    weight: Tensor = module.weight.data
    return weight if isinstance(module, nn.Linear) else weight.T


def _fold_output(module: Any, edit: Edit) -> None:
    _rows(module).mul_(edit.scale[:, None])
    if module.bias is not None:
        module.bias.data = edit.scale * module.bias.data + edit.bias


def _fold_input(module: Any, edit: Edit) -> None:
    if module.bias is not None:
        module.bias.data += _rows(module) @ edit.bias
    _rows(module).mul_(edit.scale)


def _fold_norm(module: Any, edit: Edit, model_type: str) -> None:
    offset = 1.0 if model_type.startswith("gemma") else 0.0  # Gemma keeps its weights less 1
    module.weight.data = edit.scale * (module.weight.data + offset) - offset
    if getattr(module, "bias", None) is not None:
        module.bias.data = edit.scale * module.bias.data + edit.bias


def _with_head(model: Any, head: Head) -> Any:
    """Returns the architecture's own model for sequence classification with this head."""
    from transformers import AutoModelForSequenceClassification

    kind, labels = head.config.kind, head.config.labels
    if model.config.model_type not in _HEAD_CLASSES.get(kind, ()):
        raise InvalidAdapterError(
            f"the {model.config.model_type!r} models of transformers have no head of kind {kind!r}"
        )
    config = type(model.config)(**model.config.to_dict())
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}
    config.problem_type = head.config.problem_type
    whole = AutoModelForSequenceClassification.from_config(config)
    start = "classifier." if kind in ("roberta", "electra") else ""
    weights = {f"{start}{name}": tensor for name, tensor in head.tensors.items()}
    for name, tensor in model.state_dict().items():
        weights[f"{whole.base_model_prefix}.{name}"] = tensor
    result = whole.load_state_dict(weights, strict=False)
    if result.missing_keys:
        raise InvalidAdapterError(
            f"the base model has no {shown(result.missing_keys[0])}, on which heads of kind "
            f"{kind!r} stand"
        )
    return whole.eval()
