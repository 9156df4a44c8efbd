"""PackedDecoder: a frozen Llama-like model over examples without padding, for training on a CPU."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..bases.architectures import LLAMA_LIKE
from .bank import Owners, VectorBank
from .examples import Example, edited_tokens
from .frozen import Group, Product, attended, gated, groups_of, products, rms_norm, rotated


def can_pack(model: Any) -> bool:
    """Whether a PackedDecoder computes what this model does, where it is now."""
    if type(model).__name__ not in LLAMA_LIKE:
        return False
    linears = [module for module in model.model.layers.modules() if hasattr(module, "in_features")]
    return (
        model.device.type == "cpu"
        and model.config.hidden_act == "silu"
        and getattr(model.config, "sliding_window", None) is None
        and all(type(linear) is nn.Linear for linear in linears)
    )


class _Norm(NamedTuple):
    weight: Tensor
    eps: float

    @classmethod
    def of(cls, module: Any) -> "_Norm":
        return cls(module.weight.detach().float(), module.variance_epsilon)

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class _Step(NamedTuple):
    """The packed tokens of a pass."""

    owners: Owners
    groups: Sequence[Group]
    cos: Tensor  # [tokens, 1, half of a head]
    sin: Tensor
    predicting: Tensor  # [terms], the tokens whose last hidden states are wanted


class PackedDecoder:
    """Runs examples one behind the other through a model, edited by a bank.

    Weights are the model's own, or copies in bf16 with `autocast`. Products and the gates between
    them are computed in their dtype, everything else in fp32. The last layer puts out only what
    predicts an answer's token.
    """

    pads = False

    def __init__(self, model: Any, bank: VectorBank, autocast: bool = False) -> None:
        """`model` must be one that `can_pack`."""
        self._embeddings = model.get_input_embeddings()
        self._rotary = model.model.rotary_emb
        self._dtype = model.lm_head.weight.dtype
        products_dtype = torch.bfloat16 if autocast else self._dtype
        self._layers = [
            _Layer(layer, f"model.layers.{number}", bank, products_dtype)
            for number, layer in enumerate(model.model.layers)
        ]
        self._norm = _Norm.of(model.model.norm)

    def hidden(self, examples: Sequence[Example], adapters: Sequence[int]) -> Tensor:
        """Returns the output matrix's inputs [terms, hidden size], of one example after another."""
        ids: list[int] = []
        places: list[int] = []
        predicting: list[int] = []
        for example in examples:
            sequence = (example.inputs + example.targets)[:-1]
            predicting += range(len(ids) + len(example.inputs) - 1, len(ids) + len(sequence))
            ids += sequence
            places += range(len(sequence))
        lengths = [example.length - 1 for example in examples]
        x = self._embeddings(torch.tensor(ids)).float()
        # Both halves of a head are turned by the same angles.
        turns = self._rotary(x[None], torch.tensor(places)[None])
        cos, sin = (turn[0, :, None, : turn.shape[-1] // 2].contiguous() for turn in turns)
        inside = edited_tokens(examples, lengths)
        owners = Owners(
            torch.tensor(adapters).repeat_interleave(torch.tensor(lengths)),
            None if inside is None else torch.cat(inside),
        )
        step = _Step(owners, groups_of(lengths), cos, sin, torch.tensor(predicting))
        for layer in self._layers:
            x = layer(x, step, is_last=layer is self._layers[-1])
        return self._norm(x).to(self._dtype)


class _Layer:
    """One layer of the model; weights are detached, so that nothing asks for their gradients."""

    def __init__(self, layer: Any, path: str, bank: VectorBank, dtype: torch.dtype) -> None:
        self._path, self._bank = path, bank
        attention = layer.self_attn
        self._head_dim: int = attention.head_dim
        self._scale: float = attention.scaling
        self._products = {
            name: Product.of(module, dtype)
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear)
        }
        self._input_norm = _Norm.of(layer.input_layernorm)
        self._ffn_norm = _Norm.of(layer.post_attention_layernorm)
        self._has_head_norms = hasattr(attention, "q_norm")
        if self._has_head_norms:
            self._q_norm, self._k_norm = _Norm.of(attention.q_norm), _Norm.of(attention.k_norm)

    def __call__(self, x: Tensor, step: _Step, is_last: bool) -> Tensor:
        """Returns the layer's output [tokens, hidden size], of the last only where it is wanted."""
        names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        q, k, v = (
            heads.float().view(len(x), -1, self._head_dim)
            for heads in self._edited(names, self._input_norm(x), step.owners)
        )
        if self._has_head_norms:
            q, k = self._q_norm(q), self._k_norm(k)
        q, k = rotated(q, step.cos, step.sin), rotated(k, step.cos, step.sin)
        heads = attended(q, k, v, step.groups, self._scale).view(len(x), -1)
        owners = step.owners
        if is_last:
            x, heads = x[step.predicting], heads[step.predicting]
            owners = owners[step.predicting]
        (out,) = self._edited(("self_attn.o_proj",), heads, owners)
        x = x + out
        gate, up = self._edited(("mlp.gate_proj", "mlp.up_proj"), self._ffn_norm(x), owners)
        (out,) = self._edited(("mlp.down_proj",), gated(gate, up), owners)
        return self._bank.edited(self._path, x + out, owners)

    def _edited(self, names: Sequence[str], x: Tensor, owners: Owners) -> list[Tensor]:
        """Returns the edited outputs of linear layers that have one input."""
        outputs = products(x, *(self._products[name] for name in names))
        return [
            self._bank.edited(f"{self._path}.{name}", output, owners)
            for name, output in zip(names, outputs, strict=True)
        ]
