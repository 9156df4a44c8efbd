"""FusedDecoder: a Llama-like model as few large matrix products and the kernels between them."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from redmux_server.models.accelerate import MakeLinear, joined
from redmux_server.models.attention import LayerRule, attention_modules
from redmux_server.models.editing import OwnedRows, SiteColumns, StepRows
from redmux_server.models.kvcache import NumbaKVCache
from redmux_server.models.packed_linear import PackedLinear
from redmux_server.models.paged_attention import NOTHING, Array, PagedAttention, Rotation, StepIndex
from redmux_server.models.row_kernels import add_norm, edit, gate, norm

# Pre-norm decoders whose layer is: RMS norm, q k v, rotation, attention, o, add, RMS norm,
# down(silu(gate) * up), add. Qwen3 also normalises the heads of q and k.
FUSABLE = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_NO_ROWS = np.zeros((1, 0), np.float32)


def why_not_fusable(model: Any) -> str | None:
    """Returns what keeps this model from being fused, or None."""
    architecture = type(model).__name__
    if architecture not in FUSABLE:
        return f"{architecture} is none of {', '.join(FUSABLE)}"
    if model.config.hidden_act != "silu":
        return f"its activation is {model.config.hidden_act}, not silu"
    return None


class FusedDecoder:
    """Runs the tokens of a step through weights taken from a transformers model.

    q, k, v and gate, up are one product each, norms are fused with the additions before them, and
    the edit of an FFN or attention output happens inside that kernel, so that it costs two reads.
    Every row is computed as if alone.
    """

    reads_table = True

    def __init__(
        self,
        model: Any,
        rules: Sequence[LayerRule],
        cache: NumbaKVCache,
        make_linear: MakeLinear = PackedLinear,
    ) -> None:
        """`model` must be fusable and stays as it is; weights are copied where they are fused."""
        self._cache = cache
        self._embed = model.get_input_embeddings()
        self._rotary = model.model.rotary_emb
        self.layers = [
            _Layer(module, attention.layer_idx, rule, paged, make_linear)
            for module, attention, rule, paged in zip(
                model.model.layers, attention_modules(model), rules, cache.paged, strict=True
            )
        ]
        self._norms = [*(layer.norm for layer in self.layers), _Norm(model.model.norm)]
        self.head = make_linear(*joined(model.lm_head))
        self._layout: Mapping[str, SiteColumns] = {}
        self.computes_in_torch = not all(isinstance(x, PackedLinear) for x in self.linears)

    @property
    def linears(self) -> list[nn.Module]:
        """Every matrix product, in the order in which a step runs them."""
        layers = ((x.qkv, x.o, x.gate_up, x.down) for x in self.layers)
        return [*itertools.chain.from_iterable(layers), self.head]

    def forget_sites(self) -> None:
        """See `Decoder`; a site costs something only where a step's adapters have it."""
        self._layout = {}

    def __call__(
        self, ids: Tensor, positions: Tensor, last: Tensor,
        edits: StepRows | OwnedRows | None, layout: Mapping[str, SiteColumns],
    ) -> Tensor:  # fmt: skip
        """See `Decoder`."""
        logits: Tensor = self.head(self.hidden(ids, positions, last, edits, layout))
        return logits

    def hidden(
        self, ids: Tensor, positions: Tensor, last: Tensor,
        edits: StepRows | OwnedRows | None, layout: Mapping[str, SiteColumns],
    ) -> Tensor:  # fmt: skip
        """See `Decoder`."""
        index = self._cache.index
        assert index is not None, "the cache's step is not entered"
        x: Tensor = self._embed(ids)
        cos, sin = self._rotary(x[None], positions[None])
        cos, sin = cos.numpy().reshape(-1), sin.numpy().reshape(-1)
        rows, row_of = _NO_ROWS, np.zeros(len(ids), np.int32)
        if edits is not None:
            assert isinstance(edits, OwnedRows), "kernels read the bank's own table"
            rows = edits.table.numpy()
            counts = [s.count for s in self._cache.segments]
            row_of = np.repeat(np.array(edits.owners, np.int32), counts)
            self._place(layout)
        h = torch.empty_like(x)
        first = self._norms[0]
        norm(x.numpy(), first.weight, first.eps, h.numpy())
        for i, layer in enumerate(self.layers):
            edited = layer.starts if edits is not None else _UNEDITED
            attended = layer.attend(h, cos, sin, index, rows, row_of, edited)
            if i == len(self.layers) - 1 and len(last) < len(ids):
                # Only rows that are sampled go on; the others have left their keys and values.
                x, attended, row_of = x[last], attended[last], row_of[last.numpy()]
                h = torch.empty_like(x)
            layer.feed(x, attended, h, rows, row_of, edited, self._norms[i + 1])
        return h

    def _place(self, layout: Mapping[str, SiteColumns]) -> None:
        """Looks up where each layer's sites lie in the rows, when they changed."""
        if layout == self._layout:
            return
        self._layout = dict(layout)
        for layer in self.layers:
            layer.place(layout)


class _Norm:
    def __init__(self, module: Any) -> None:
        self.weight: Array = module.weight.data.float().numpy().copy()
        self.eps = np.float32(module.variance_epsilon)


_SITES = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
_UNEDITED = (-1,) * len(_SITES)


class _Layer:
    def __init__(
        self,
        module: Any,
        index: int,
        rule: LayerRule,
        paged: PagedAttention,
        make_linear: MakeLinear,
    ) -> None:
        attention, mlp = module.self_attn, module.mlp
        self._path = f"model.layers.{index}"
        self._rule = rule
        self._paged = paged
        self.norm = _Norm(module.input_layernorm)
        self._post_norm = _Norm(module.post_attention_layernorm)
        self.qkv = make_linear(*joined(attention.q_proj, attention.k_proj, attention.v_proj))
        self.o = make_linear(*joined(attention.o_proj))
        self.gate_up = make_linear(*joined(mlp.gate_proj, mlp.up_proj))
        self.down = make_linear(*joined(mlp.down_proj))
        self._query = paged.num_heads * paged.head_dim
        self._key = paged.num_kv_heads * paged.head_dim
        self._q_weight, self._k_weight, self._eps = NOTHING, NOTHING, np.float32(0)
        if hasattr(attention, "q_norm"):
            q_norm, k_norm = _Norm(attention.q_norm), _Norm(attention.k_norm)
            self._q_weight, self._k_weight, self._eps = q_norm.weight, k_norm.weight, q_norm.eps
        self.starts: tuple[int, ...] = _UNEDITED

    def place(self, layout: Mapping[str, SiteColumns]) -> None:
        """Notes where this layer's vectors start in a row, -1 for a site that nobody edits."""
        found = (layout.get(f"{self._path}.{site}") for site in _SITES)
        self.starts = tuple(-1 if columns is None else columns.start for columns in found)

    def attend(
        self, h: Tensor, cos: Array, sin: Array, index: StepIndex,
        rows: Array, row_of: Array, starts: Sequence[int],
    ) -> Tensor:  # fmt: skip
        """Returns the attention output [tokens, heads * head_dim] of normed h [tokens, hidden]."""
        qkv = self.qkv(h).numpy()
        at = 0
        for start, dim in zip(starts, (self._query, self._key, self._key), strict=False):
            if start >= 0:
                edit(qkv, at, dim, rows, row_of, start)
            at += dim
        out = torch.empty(len(qkv), self._query)
        rotation = Rotation(cos, sin, self._q_weight, self._k_weight, self._eps)
        self._paged.attend_packed(
            qkv, out.numpy(), rotation, index,
            self._rule.scale, self._rule.window,
        )  # fmt: skip
        return out

    def feed(
        self, x: Tensor, attended: Tensor, h: Tensor,
        rows: Array, row_of: Array, starts: Sequence[int], next_norm: _Norm,
    ) -> None:  # fmt: skip
        """Adds this layer's outputs to x and leaves the next norm of x in h, [tokens, hidden]."""
        residual, normed, post = x.numpy(), h.numpy(), self._post_norm
        y = self.o(attended).numpy()
        add_norm(residual, y, rows, row_of, starts[3], post.weight, post.eps, normed)
        gate_up = self.gate_up(h).numpy()
        width = gate_up.shape[1] // 2
        for start, at in ((starts[4], 0), (starts[5], width)):
            if start >= 0:
                edit(gate_up, at, width, rows, row_of, start)
        product = torch.empty(len(gate_up), width)
        gate(gate_up, product.numpy())
        y = self.down(product).numpy()
        add_norm(residual, y, rows, row_of, starts[6], next_norm.weight, next_norm.eps, normed)
