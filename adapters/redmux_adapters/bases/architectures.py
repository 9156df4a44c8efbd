"""Where RED's positions are inside the layers of each architecture, as data.

Adapters address modules by path, so serving a new architecture needs no entry here: the table only
turns the paper's names for positions into paths, and tells importers what may be moved where.
"""

import re
from dataclasses import dataclass
from typing import Any

from redmux.errors import InvalidArgumentError

# Pre-norm decoders whose layer is: RMS norm, q k v, rotation, attention, o, add, RMS norm,
# down(silu(gate) * up), add. Qwen3 also normalises the heads of q and k.
LLAMA_LIKE = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


@dataclass(frozen=True)
class Stack:
    """One list of equal layers. The paths in it are relative to a layer; "" is the layer itself."""

    layers: str
    ffn: str  # output projection of the feed-forward part
    attn: tuple[str, ...]  # output projections of the attentions
    qkv: tuple[str, ...]  # what RED++ edits besides
    # The modules whose outputs are the sum with the residual, normed where the norm comes after:
    res: str  # at the end of the layer
    res_attn: tuple[str, ...] = ()  # after the attentions, where there is such a module
    # What the input of `ffn` is made of: the linear that a gate is multiplied with, where the model
    # has one, else the module whose output is the activation.
    up: str = ""
    up_is_second_half: bool = False  # of a linear whose first half is the gate
    act: str = ""
    before_act: str = ""  # the linear that feeds the activation, where that may be a ReLU
    # Whether the residual stream at the end of a layer is the FFN's output plus something, so that
    # a vector added to the one is a vector added to the other.
    adds_ffn: bool = False


def stacks_of(model_type: str) -> tuple[Stack, ...]:
    """Returns the lists of layers of an architecture, or raises InvalidArgumentError."""
    stacks = _STACKS.get(model_type)
    if stacks is None:
        raise InvalidArgumentError(
            f"the positions of RED in {model_type!r} models are not known; known are "
            f"{', '.join(sorted(_STACKS))}; for others name modules, as in "
            "--sites '*.mlp.down_proj', of a mixture of experts --sites '*.self_attn.o_proj'"
        )
    return stacks


def is_known(model_type: str) -> bool:
    """Whether the table has the architecture."""
    return model_type in _STACKS


def model_type_of(base_fingerprint: str) -> str:
    """Returns the architecture that a base fingerprint begins with."""
    return re.split(r"-\d+x\d+-", base_fingerprint)[0]


def _llama(**changes: Any) -> tuple[Stack, ...]:
    attention = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    values: dict[str, Any] = {
        "layers": "model.layers",
        "ffn": "mlp.down_proj",
        "attn": ("self_attn.o_proj",),
        "qkv": attention,
        "res": "",
        "up": "mlp.up_proj",
        "adds_ffn": True,
    }
    return (Stack(**values | changes),)


def _bert() -> tuple[Stack, ...]:
    own = "attention.self"
    return (
        Stack(
            layers="encoder.layer",
            ffn="output.dense",
            attn=("attention.output.dense",),
            qkv=(f"{own}.query", f"{own}.key", f"{own}.value"),
            res="output",
            res_attn=("attention.output",),
            act="intermediate",
        ),
    )


def _t5() -> tuple[Stack, ...]:
    def stack(layers: str, attentions: tuple[str, ...], ffn: str) -> Stack:
        return Stack(
            layers=layers,
            ffn=f"{ffn}.DenseReluDense.wo",
            attn=tuple(f"{path}.o" for path in attentions),
            qkv=tuple(f"{path}.{name}" for path in attentions for name in "qkv"),
            res=ffn,
            res_attn=tuple(path.rpartition(".")[0] for path in attentions),
            up=f"{ffn}.DenseReluDense.wi_1",
            act=f"{ffn}.DenseReluDense.act",
            before_act=f"{ffn}.DenseReluDense.wi",
            adds_ffn=True,
        )

    return (
        stack("encoder.block", ("layer.0.SelfAttention",), "layer.1"),
        stack("decoder.block", ("layer.0.SelfAttention", "layer.1.EncDecAttention"), "layer.2"),
    )


_STACKS: dict[str, tuple[Stack, ...]] = {
    "bert": _bert(),
    "distilbert": (
        Stack(
            layers="transformer.layer",
            ffn="ffn.lin2",
            attn=("attention.out_lin",),
            qkv=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
            res="output_layer_norm",
            res_attn=("sa_layer_norm",),
            act="ffn.activation",
        ),
    ),
    "electra": _bert(),
    "gemma": _llama(),
    "gemma2": _llama(adds_ffn=False),  # a norm lies between the FFN and the residual
    "gemma3_text": _llama(adds_ffn=False),
    "gpt2": (
        Stack(
            layers="transformer.h",
            ffn="mlp.c_proj",
            attn=("attn.c_proj",),
            qkv=("attn.c_attn",),
            res="",
            act="mlp.act",
            adds_ffn=True,
        ),
    ),
    "gpt_neox": (
        Stack(
            layers="gpt_neox.layers",
            ffn="mlp.dense_4h_to_h",
            attn=("attention.dense",),
            qkv=("attention.query_key_value",),
            res="",
            act="mlp.act",
            adds_ffn=True,
        ),
    ),
    "granite": _llama(adds_ffn=False),  # a factor lies between the FFN and the residual
    "llama": _llama(),
    "mistral": _llama(),
    "mpnet": (
        Stack(
            layers="encoder.layer",
            ffn="output.dense",
            attn=("attention.attn.o",),
            qkv=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
            res="output",
            res_attn=("attention.LayerNorm",),
            act="intermediate",
        ),
    ),
    "mt5": _t5(),
    "olmo2": _llama(adds_ffn=False),  # a norm lies between the FFN and the residual
    "opt": (
        Stack(
            layers="model.decoder.layers",
            ffn="fc2",
            attn=("self_attn.out_proj",),
            qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            res="",
            act="activation_fn",
            before_act="fc1",
            # `adds_ffn` does not hold for OPT-350M, whose norms come after the sums.
        ),
    ),
    "phi": (
        Stack(
            layers="model.layers",
            ffn="mlp.fc2",
            attn=("self_attn.dense",),
            qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            res="",
            act="mlp.activation_fn",
            adds_ffn=True,
        ),
    ),
    "phi3": _llama(qkv=("self_attn.qkv_proj",), up="mlp.gate_up_proj", up_is_second_half=True),
    "qwen2": _llama(),
    "qwen3": _llama(),
    "roberta": _bert(),
    "smollm3": _llama(),
    "t5": _t5(),
    "xlm-roberta": _bert(),
}
