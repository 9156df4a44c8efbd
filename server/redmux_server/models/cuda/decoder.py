"""The models that a DeviceRunner can run: as transformers has them, or fused by Triton kernels."""

import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from redmux_server.engine.bank import SiteColumns
from redmux_server.models.causal.runner import stack_of
from redmux_server.models.cpu.accelerate import joined
from redmux_server.models.cpu.decoder_pass import SITES
from redmux_server.models.cpu.fused_decoder import why_not_fusable
from redmux_server.models.cuda.paged_cache import AttentionRule, PagedKVCache
from redmux_server.models.cuda.paged_step import PagedStep
from redmux_server.models.editing import Editing, RowEdit, TableRows
from redmux_server.models.kvcache import LayerRule

if TYPE_CHECKING:
    from redmux_server.models.cuda.triton_products import FewRowProducts

# Rotations whose angles depend on the longest position of a step.
_CHANGING_ROTATIONS = ("dynamic", "longrope")


@dataclass(frozen=True, slots=True, eq=False)
class StepTensors:
    """What one forward pass reads."""

    ids: Tensor  # [tokens] int64
    positions: Tensor  # [tokens] int64
    rows: Tensor  # [tokens] int32, of the adapter bank's table
    paged: PagedStep
    last: Tensor | None  # [samples] int64, tokens whose logits are wanted; None for all


@dataclass(frozen=True, slots=True)
class DecodeWay:
    """A way to compute the logits of decode steps of up to `most_rows` requests."""

    name: str
    logits: Callable[[StepTensors, Tensor], Tensor]  # as DeviceDecoder.logits
    most_rows: int = sys.maxsize


class DeviceDecoder(Protocol):
    """A causal language model over the packed tokens of one step."""

    def install(self, layout: Mapping[str, SiteColumns]) -> None:
        """Makes the sites of `layout`, and no others, be edited."""

    def forget_sites(self) -> None:
        """Makes sites that were edited so far cost nothing."""

    def logits(self, step: StepTensors, table: Tensor) -> Tensor:
        """Returns [samples, vocab]; `table` is the bank's, [bank rows, width]."""

    def hidden(self, step: StepTensors, table: Tensor) -> Tensor:
        """Returns the last hidden states [tokens, hidden]."""

    def decode_ways(self) -> Sequence[DecodeWay]:
        """Returns the ways to compute decode steps with the installed sites, `logits` first."""


class HookedDecoder:
    """The model as transformers runs it, with a hook at each edited site."""

    def __init__(self, model: Any, cache: PagedKVCache, edit: RowEdit) -> None:
        """`model` runs its attention over `cache` already."""
        self._model = model
        self._cache = cache
        self._edit = edit
        self._editing = Editing(model)

    def install(self, layout: Mapping[str, SiteColumns]) -> None:
        """See DeviceDecoder."""
        self._editing.install(layout)

    def forget_sites(self) -> None:
        """See DeviceDecoder."""
        self._editing.remove()

    def logits(self, step: StepTensors, table: Tensor) -> Tensor:
        """See DeviceDecoder."""
        rows = TableRows(table, step.rows, self._edit)
        with self._cache.use(step.paged), self._editing.step(rows):
            logits: Tensor = self._model(
                input_ids=step.ids[None],
                position_ids=step.positions[None],
                use_cache=False,
                logits_to_keep=0 if step.last is None else step.last,
            ).logits[0]
        return logits

    def hidden(self, step: StepTensors, table: Tensor) -> Tensor:
        """See DeviceDecoder."""
        rows = TableRows(table, step.rows, self._edit)
        with self._cache.use(step.paged), self._editing.step(rows):
            states: Tensor = stack_of(self._model)(
                input_ids=step.ids[None], position_ids=step.positions[None], use_cache=False
            ).last_hidden_state[0]
        return states

    def decode_ways(self) -> Sequence[DecodeWay]:
        """See DeviceDecoder."""
        return [DecodeWay("transformers' own modules", self.logits)]


@dataclass(frozen=True, slots=True, eq=False)
class _Layer:
    norm: Tensor
    qkv: tuple[Tensor, Tensor | None]  # weight, bias
    head_norms: tuple[Tensor, Tensor, float] | None
    rule: AttentionRule
    keys: Tensor
    values: Tensor
    out: tuple[Tensor, Tensor | None]
    ffn_norm: Tensor
    gate_up: tuple[Tensor, Tensor | None]
    down: tuple[Tensor, Tensor | None]
    sites: Sequence[str]  # paths of SITES


class FusedDeviceDecoder:
    """A Llama-like model as four products a layer and the kernels of `triton_layers` between them.

    The products of q, k, v and of gate, up are one each; the model's own modules become views of
    the joined weights, so that nothing is held twice. While some adapter edits what no kernel does,
    the sum of a layer or a LayerNorm behind an edit, steps run through `others` instead.
    Decode steps may have a second way, where the products do what the kernels do otherwise.
    """

    def __init__(
        self, model: Any, rules: Sequence[LayerRule], cache: PagedKVCache, max_context: int,
        others: HookedDecoder, few_rows: "Mapping[str, FewRowProducts] | None" = None,
    ) -> None:  # fmt: skip
        """`max_context` bounds the positions; `others` is the same model over the same cache.

        `few_rows` are kinds of products that decode steps may use instead, by name.
        Raises ImportError without Triton, and ValueError for a model that it cannot run.
        """
        from redmux_server.models.cuda import triton_layers
        from redmux_server.models.cuda.paged_triton import TritonAttention

        if reason := why_not_fused_on_device(model, rules):
            raise ValueError(reason)
        self._others = others
        self._few_rows = few_rows or {}
        self._kernels = triton_layers
        self._attention = self._early_attention = cache.attention
        if isinstance(self._attention, TritonAttention):
            self._early_attention = self._attention.launched_early()
        self._embedding: Tensor = model.get_input_embeddings().weight
        self._head: Tensor = model.get_output_embeddings().weight
        self._norm: Tensor = model.model.norm.weight
        self._eps = float(model.model.norm.variance_epsilon)
        self._cos, self._sin = _rotations(model, max_context)
        self._layers = [
            _layer(i, layer, rule, cache)
            for i, (layer, rule) in enumerate(zip(model.model.layers, rules, strict=True))
        ]
        self.forget_sites()

    def install(self, layout: Mapping[str, SiteColumns]) -> None:
        """See DeviceDecoder."""
        known = {path for layer in self._layers for path in layer.sites}
        self._uses_others = not layout.keys() <= known
        if self._uses_others:
            self._others.install(layout)
        else:
            self._others.forget_sites()
        self._starts = [
            [layout[path].start if path in layout else -1 for path in layer.sites]
            for layer in self._layers
        ]

    def forget_sites(self) -> None:
        """See DeviceDecoder."""
        self.install({})

    def logits(self, step: StepTensors, table: Tensor) -> Tensor:
        """See DeviceDecoder."""
        if self._uses_others:
            return self._others.logits(step, table)
        h = self.hidden(step, table)
        return F.linear(h if step.last is None else h[step.last], self._head)

    def hidden(self, step: StepTensors, table: Tensor) -> Tensor:
        """See DeviceDecoder."""
        if self._uses_others:
            return self._others.hidden(step, table)
        kernels, eps, rows = self._kernels, self._eps, step.rows
        x = F.embedding(step.ids, self._embedding)
        h = kernels.add_norm(x, None, self._layers[0].norm, eps, table, rows, -1)
        for layer, starts, next_norm in self._walk():
            *qkv_starts, o_start, gate_start, up_start, down_start = starts
            mixed = self._attend(layer, F.linear(h, *layer.qkv), step, table, qkv_starts)
            y = F.linear(mixed, *layer.out)
            h = kernels.add_norm(x, y, layer.ffn_norm, eps, table, rows, o_start)
            gated = kernels.gate(F.linear(h, *layer.gate_up), table, rows, gate_start, up_start)
            y = F.linear(gated, *layer.down)
            h = kernels.add_norm(x, y, next_norm, eps, table, rows, down_start)
        states: Tensor = h
        return states

    def decode_ways(self) -> Sequence[DecodeWay]:
        """See DeviceDecoder."""
        ways = [DecodeWay("separate kernels", self.logits)]
        if not self._uses_others:
            ways += [
                DecodeWay(name, functools.partial(self._few_row_logits, few), few.most_rows)
                for name, few in self._few_rows.items()
            ]
        return ways

    def _walk(self) -> Iterator[tuple[_Layer, Sequence[int], Tensor]]:
        """Yields the layers, where each site's columns start, and the norm behind the layer."""
        next_norms = [*(layer.norm for layer in self._layers[1:]), self._norm]
        return zip(self._layers, self._starts, next_norms, strict=True)

    def _few_row_logits(self, few: "FewRowProducts", step: StepTensors, table: Tensor) -> Tensor:
        """As `logits` of all tokens, by products that normalise, edit, gate and add."""
        rows = step.rows
        residual = few.start(step.ids, self._embedding, self._layers[0].norm)
        for layer, starts, next_norm in self._walk():
            *qkv_starts, o_start, gate_start, up_start, down_start = starts
            qkv = few.project(residual, *layer.qkv)
            mixed = self._attend(layer, qkv, step, table, qkv_starts, early=few.early)
            few.add(residual, mixed, *layer.out, layer.ffn_norm, table, rows, o_start)
            gated = few.gate(residual, *layer.gate_up, table, rows, gate_start, up_start)
            few.add(residual, gated, *layer.down, next_norm, table, rows, down_start)
        h = self._kernels.add_norm(residual.x, None, self._norm, self._eps, table, rows, -1)
        return F.linear(h, self._head)

    def _attend(
        self, layer: _Layer, qkv: Tensor, step: StepTensors, table: Tensor, starts: Sequence[int],
        *, early: bool = False,
    ) -> Tensor:  # fmt: skip
        """Returns what the heads give out, [tokens, heads * head_dim]."""
        paged = step.paged
        query = self._kernels.rotate(
            qkv, layer.keys, layer.values, paged.slots, step.positions,
            self._cos, self._sin, layer.head_norms, table, step.rows, starts, early=early,
        )  # fmt: skip
        attention = self._early_attention if early else self._attention
        return attention(paged, layer.rule, query, layer.keys, layer.values).flatten(1)


def why_not_fused_on_device(model: Any, rules: Sequence[LayerRule]) -> str | None:
    """Returns what keeps this model from being fused on a device, or None."""
    if reason := why_not_fusable(model):
        return reason
    config = model.config
    rotation = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rotation in _CHANGING_ROTATIONS:
        return f"its rotations change with the context ({rotation})"
    if any(rule.softcap for rule in rules):
        return "its attention has a soft cap"
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        return "its output head has a bias"
    return None


def _layer(i: int, layer: Any, rule: LayerRule, cache: PagedKVCache) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    paged = cache.layers[i]
    q_norm = getattr(attention, "q_norm", None)
    norms = None
    if q_norm is not None:
        norms = q_norm.weight, attention.k_norm.weight, float(q_norm.variance_epsilon)
    return _Layer(
        layer.input_layernorm.weight,
        _join_in_place(attention.q_proj, attention.k_proj, attention.v_proj),
        norms,
        AttentionRule(paged.shape, rule.scale, rule.window, rule.softcap),
        paged.keys,
        paged.values,
        _join_in_place(attention.o_proj),
        layer.post_attention_layernorm.weight,
        _join_in_place(mlp.gate_proj, mlp.up_proj),
        _join_in_place(mlp.down_proj),
        [f"model.layers.{i}.{site}" for site in SITES if site],
    )


def _join_in_place(*linears: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Returns the weight and bias of these linears as one, of which they become views."""
    weight, bias = joined(*linears)
    parts = torch.split(weight, [linear.out_features for linear in linears])
    for linear, part in zip(linears, parts, strict=True):
        linear.weight.data = part
    return weight, bias


@torch.inference_mode()
def _rotations(model: Any, num_positions: int) -> tuple[Tensor, Tensor]:
    """Returns cos and sin [positions, head_dim] in fp32."""
    positions = torch.arange(num_positions, device=model.device)
    anything = torch.zeros(1, dtype=torch.float32, device=model.device)
    cos, sin = model.model.rotary_emb(anything, positions[None])
    head_dim = model.model.layers[0].self_attn.head_dim
    if cos.shape[2] != head_dim:
        raise ValueError(f"it rotates {cos.shape[2]} of a head's {head_dim} dimensions")
    return cos[0].contiguous(), sin[0].contiguous()
