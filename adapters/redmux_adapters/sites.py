"""Where a model can be edited: the module paths and output sizes that adapters address."""

from typing import Any

from torch import nn

from redmux.errors import InvalidArgumentError

# Where the layers are, and the path of the FFN's output projection inside one. The paper edits
# Llama's down_proj and GPT-2's mlp.c_proj; the others are the same place of the same block.
_LLAMA_LIKE = ("model.layers", "mlp.down_proj")
_FFN_OUTPUTS = {
    "gemma": _LLAMA_LIKE,
    "gemma2": _LLAMA_LIKE,
    "gemma3_text": _LLAMA_LIKE,
    "gpt2": ("transformer.h", "mlp.c_proj"),
    "gpt_neox": ("gpt_neox.layers", "mlp.dense_4h_to_h"),
    "granite": _LLAMA_LIKE,
    "llama": _LLAMA_LIKE,
    "mistral": _LLAMA_LIKE,
    "olmo2": _LLAMA_LIKE,
    "opt": ("model.decoder.layers", "fc2"),
    "phi": ("model.layers", "mlp.fc2"),
    "phi3": _LLAMA_LIKE,
    "qwen2": _LLAMA_LIKE,
    "qwen3": _LLAMA_LIKE,
    "smollm3": _LLAMA_LIKE,
}


def ffn_sites(model: nn.Module) -> dict[str, int]:
    """Returns {module path: output size} of the FFN output projection of every layer (RED's sites).

    Ask right after loading: whoever replaces modules later keeps the paths, not the classes.
    Raises InvalidArgumentError for an architecture whose sites are not known.
    """
    layers, output = _layout(model)
    return {
        path: dim
        for path, dim in _projections(model, layers).items()
        if path.removeprefix(f"{layers}.").partition(".")[2] == output
    }


def editable_sites(model: nn.Module) -> dict[str, int]:
    """Returns {module path: output size} of every linear module in the model's layers.

    That is what RED++ chooses from: attention and FFN projections, neither embeddings nor the
    output head. Ask right after loading, as for `ffn_sites`. Needs no knowledge of the
    architecture; raises InvalidArgumentError for a model without one list of layers.
    """
    config: Any = model.config
    depth = config.get_text_config().num_hidden_layers
    stacks = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    if len(stacks) != 1:
        raise InvalidArgumentError(
            f"{config.model_type!r} models have {len(stacks)} lists of {depth} modules; the layers "
            "have to be one list"
        )
    return _projections(model, stacks[0])


def seq2seq_sites(model: nn.Module) -> dict[str, int]:
    """Returns {module path: output size} of every linear in the blocks of both of T5's stacks.

    RED's own sites are those that end in `DenseReluDense.wo`.
    """
    return _projections(model, "encoder.block") | _projections(model, "decoder.block")


def _layout(model: nn.Module) -> tuple[str, str]:
    config: Any = model.config
    layout = _FFN_OUTPUTS.get(config.model_type)
    if layout is None:
        raise InvalidArgumentError(
            f"the editable modules of {config.model_type!r} models are not known; known are "
            f"{', '.join(_FFN_OUTPUTS)}"
        )
    return layout


def _projections(model: nn.Module, layers: str) -> dict[str, int]:
    from transformers.pytorch_utils import Conv1D

    sites = {}
    for path, module in model.named_modules():
        if not path.startswith(f"{layers}."):
            continue
        if isinstance(module, nn.Linear):
            sites[path] = module.out_features
        elif isinstance(module, Conv1D):
            sites[path] = module.nf
    return sites
