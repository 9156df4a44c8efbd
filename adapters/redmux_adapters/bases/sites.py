"""Where a model can be edited: the module paths and output sizes that adapters address."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal, get_args

from torch import nn

from redmux.errors import InvalidArgumentError

from .architectures import Stack, is_known, stacks_of

# The RED authors' names (`op_position`); "more" is their RED++.
Position = Literal["ffn", "attn", "ffn_attn", "more", "res", "res_with_attn"]
POSITIONS: tuple[Position, ...] = get_args(Position)
# What follows a site's path in that of the LayerNorm behind its edit, the authors' variant "ln".
# It is no module of the base model: the adapter brings all of it.
LAYER_NORM = ".activation_ln"


def ffn_sites(model: nn.Module) -> dict[str, int]:
    """Returns {module path: output size} of the FFN output projection of every layer (RED's sites).

    Ask right after loading: whoever replaces modules later keeps the paths, not the classes.
    Raises InvalidArgumentError for an architecture whose sites are not known.
    """
    return red_sites(model, "ffn")


def red_sites(
    model: nn.Module,
    position: Position = "ffn",
    *,
    layers: Collection[int] | None = None,
    exclude: Collection[int] = (),
) -> dict[str, int]:
    """Returns {module path: output size} of a position of the RED authors' code.

    "ffn" and "attn" are the output projections of a layer's parts, "ffn_attn" both, "more" these
    and the projections to queries, keys and values. "res" is the sum with the residual at the end
    of a layer, after its norm where that comes after the sum; "res_with_attn" that and the sum
    after the attention. `layers` counts from 0, in each stack of an encoder-decoder.

    Raises InvalidArgumentError for unknown architectures, layers that the model does not have, and
    positions that are no module's output.
    """
    if position not in POSITIONS:
        raise InvalidArgumentError(f"no position {position!r}; known are {', '.join(POSITIONS)}")
    config: Any = model.config
    hidden_size = config.get_text_config().hidden_size
    linears = _linears(model)
    sites = {}
    for stack in stacks_of(config.model_type):
        parts = _parts(stack, position, config.model_type)
        for layer in _chosen(_depth(model, stack), layers, exclude):
            for part in parts:
                path = site_path(stack, layer, part)
                sites[path] = linears.get(path, hidden_size)
    if not sites:
        raise InvalidArgumentError("no layer is left; choose at least one")
    return sites


def linear_sites(model: nn.Module) -> dict[str, int]:
    """Returns {module path: output size} of every linear module in the model's layers.

    Those are attention and FFN projections, neither embeddings nor the output head. Ask right
    after loading, as for `ffn_sites`. A model that the table does not know has to have one list of
    layers, else InvalidArgumentError is raised.
    """
    config: Any = model.config
    if is_known(config.model_type):
        stacks = [stack.layers for stack in stacks_of(config.model_type)]
    else:
        stacks = [_only_list(model, config)]
    starts = tuple(f"{path}." for path in stacks)
    return {path: dim for path, dim in _linears(model).items() if path.startswith(starts)}


def editable_sites(model: nn.Module) -> dict[str, int]:
    """Returns {module path: output size} of all that a server edits.

    Those are `linear_sites` and, for known architectures, the sums with the residual. Raises as
    `linear_sites` does.
    """
    config: Any = model.config
    sites = linear_sites(model)
    if is_known(config.model_type):
        hidden_size = config.get_text_config().hidden_size
        for stack in stacks_of(config.model_type):
            for layer in range(_depth(model, stack)):
                for part in (stack.res, *stack.res_attn):
                    sites[site_path(stack, layer, part)] = hidden_size
    return sites


def addressable_sites(model: nn.Module) -> dict[str, int]:
    """Returns {module path: output size} of all that an adapter for this model may name.

    Those are `editable_sites`, the norms, and for known architectures the activations inside the
    FFN, which no server edits yet.
    """
    config: Any = model.config
    sites = editable_sites(model)
    for path, module in model.named_modules():
        if is_norm(module):
            sites[path] = module.weight.shape[0]
    if not is_known(config.model_type):
        return sites
    for stack in stacks_of(config.model_type):
        for layer in range(_depth(model, stack)):
            ffn = model.get_submodule(site_path(stack, layer, stack.ffn))
            if stack.act:
                sites.setdefault(site_path(stack, layer, stack.act), _num_inputs(ffn))
    return sites


def with_layer_norms(sites: Mapping[str, int]) -> dict[str, int]:
    """Returns the sites with a LayerNorm behind each, which has the size of its site."""
    return {path + end: dim for path, dim in sites.items() for end in ("", LAYER_NORM)}


def site_path(stack: Stack, layer: int, part: str) -> str:
    """Returns the module path of a part of a layer."""
    return f"{stack.layers}.{layer}.{part}".rstrip(".")


def is_norm(module: nn.Module) -> bool:
    """Whether `module` is a LayerNorm or RMSNorm with a weight per value."""
    weight = getattr(module, "weight", None)
    return type(module).__name__.endswith("Norm") and weight is not None and weight.dim() == 1


def _parts(stack: Stack, position: Position, model_type: str) -> tuple[str, ...]:
    match position:
        case "ffn":
            return (stack.ffn,)
        case "attn":
            return stack.attn
        case "ffn_attn":
            return (*stack.attn, stack.ffn)
        case "more":
            return (*stack.qkv, *stack.attn, stack.ffn)
        case "res":
            return (stack.res,)
        case "res_with_attn":
            if not stack.res_attn:
                raise InvalidArgumentError(
                    f"the sum after the attention of {model_type!r} models is no module's output, "
                    "so it has no path; use 'res' or 'ffn_attn'"
                )
            return (*stack.res_attn, stack.res)


def _chosen(depth: int, layers: Collection[int] | None, exclude: Collection[int]) -> Iterator[int]:
    for layer in (*(layers or ()), *exclude):
        if not 0 <= layer < depth:
            raise InvalidArgumentError(f"no layer {layer}; the model has layers 0 to {depth - 1}")
    return (
        layer
        for layer in range(depth)
        if (layers is None or layer in layers) and layer not in exclude
    )


def _depth(model: nn.Module, stack: Stack) -> int:
    try:
        layers = model.get_submodule(stack.layers)
    except AttributeError:
        raise InvalidArgumentError(
            f"{type(model).__name__} has no {stack.layers!r}; load encoders with AutoModel, others "
            "as causal or sequence-to-sequence language models"
        ) from None
    assert isinstance(layers, nn.ModuleList)
    return len(layers)


def _only_list(model: nn.Module, config: Any) -> str:
    depth: int = config.get_text_config().num_hidden_layers
    stacks = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    if len(stacks) != 1:
        why = "share modules, or are no list of modules" if not stacks else "cannot be told apart"
        raise InvalidArgumentError(
            f"{config.model_type!r} models cannot be edited layer by layer: {len(stacks)} lists of "
            f"{depth} modules were found where one was expected, so their layers {why}"
        )
    (stack,) = stacks
    return str(stack)


def _linears(model: nn.Module) -> dict[str, int]:
    from transformers.pytorch_utils import Conv1D

    sites = {}
    for path, module in model.named_modules():
        # Not a subclass with a forward of its own, such as a router that puts out a tuple.
        if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
            sites[path] = module.out_features
        elif isinstance(module, Conv1D):
            sites[path] = module.nf
    return sites


def _num_inputs(module: nn.Module) -> int:
    if isinstance(module, nn.Linear):
        return module.in_features
    return int(module.nx)  # type: ignore[arg-type]
