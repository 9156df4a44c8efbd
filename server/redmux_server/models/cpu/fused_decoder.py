"""FusedDecoder: a Llama-like model as few large matrix products and the kernels between them."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor, nn

from redmux_adapters.bases.architectures import LLAMA_LIKE
from redmux_adapters.bases.sites import LAYER_NORM
from redmux_server.engine.bank import SiteColumns
from redmux_server.models.cpu import aligned
from redmux_server.models.cpu.accelerate import joined
from redmux_server.models.cpu.decoder_pass import SITES, Model, Room, Step, run
from redmux_server.models.cpu.embeddings import Embeddings
from redmux_server.models.cpu.kvcache import NumbaKVCache
from redmux_server.models.cpu.packed_linear import PackedLinear
from redmux_server.models.cpu.packing import Packing
from redmux_server.models.cpu.vector import Array
from redmux_server.models.editing import OwnedRows, StepRows
from redmux_server.models.kvcache import LayerRule

_NO_ROWS = aligned.zeros((1, 0), np.float32)
_SMALLEST_ROOM = 64  # tokens


def why_not_fusable(model: Any) -> str | None:
    """Returns what keeps this model from being fused, or None."""
    architecture = type(model).__name__
    if architecture not in LLAMA_LIKE:
        return f"{architecture} is none of {', '.join(LLAMA_LIKE)}"
    if model.config.hidden_act != "silu":
        return f"its activation is {model.config.hidden_act}, not silu"
    return None


class FusedDecoder:
    """Runs the tokens of a step through weights taken from a transformers model.

    q, k, v and gate, up are one product each, norms are fused with the additions before them, and
    the edit of an FFN or attention output, or of the sum, happens inside that kernel, so that it
    costs two reads.
    A step is one compiled call, see `decoder_pass`. Every row is computed as if alone.
    """

    computes_in_torch = False
    reads_table = True

    def __init__(
        self, model: Any, rules: Sequence[LayerRule], cache: NumbaKVCache, packing: Packing,
        embeddings: Embeddings | None = None,
    ) -> None:  # fmt: skip
        """`model` must be fusable and stays as it is; `packing` is `pack` of it.

        `embeddings` are those of another decoder of this model, if it has any.
        """
        self._cache = cache
        self._rotary = model.model.rotary_emb
        layers = list(model.model.layers)
        self._packing = packing
        table = model.get_input_embeddings().weight
        is_tied = model.lm_head.weight is table
        # One copy is enough of what is a tenth of a large model and a fifth of a small one.
        has_rows = is_tied and packing.precision == "fp32"
        self.embeddings = None if has_rows else embeddings or Embeddings(table.data)
        self._model = _model(model, layers, rules, cache)
        self._layout: Mapping[str, SiteColumns] = {}
        self._unedited = aligned.zeros((len(layers), len(SITES) + 1, 2), np.int64)
        self._unedited[...] = -1
        self._starts = self._unedited
        self._room = room_for(packing, _SMALLEST_ROOM)

    @property
    def linears(self) -> list[nn.Module]:
        """Every matrix product, in the order in which a step runs them."""
        return [PackedLinear(self._packing, i) for i in range(len(self._packing.shapes))]

    def forget_sites(self) -> None:
        """See `Decoder`; a site costs something only where a step's adapters have it."""
        self._layout = {}

    def __call__(
        self, ids: Tensor, positions: Tensor, last: Tensor,
        edits: StepRows | OwnedRows | None, layout: Mapping[str, SiteColumns],
    ) -> Tensor:  # fmt: skip
        """See `Decoder`."""
        logits = torch.empty(len(last), self._packing.shapes[-1][0])
        self._pass(ids, positions, last, edits, layout, logits)
        return logits

    def hidden(
        self, ids: Tensor, positions: Tensor, last: Tensor,
        edits: StepRows | OwnedRows | None, layout: Mapping[str, SiteColumns],
    ) -> Tensor:  # fmt: skip
        """See `Decoder`."""
        no_logits = torch.empty(0, self._packing.shapes[-1][0])
        self._pass(ids, positions, last, edits, layout, no_logits)
        return torch.from_numpy(self._room.h[: len(last)].copy())

    def _pass(
        self, ids: Tensor, positions: Tensor, last: Tensor,
        edits: StepRows | OwnedRows | None, layout: Mapping[str, SiteColumns], logits: Tensor,
    ) -> None:  # fmt: skip
        """Leaves the last hidden states in the room, and fills `logits` if it has rows."""
        index = self._cache.index
        assert index is not None, "the cache's step is not entered"
        x = self._embed(ids)
        cos, sin = self._rotary(x[None], positions[None])
        rows, row_of, starts = _NO_ROWS, aligned.zeros(len(ids), np.int32), self._unedited
        if edits is not None:
            assert isinstance(edits, OwnedRows), "kernels read the bank's own table"
            rows = edits.table.numpy()
            row_of = aligned.copied(edits.rows)
            starts = self._placed(layout)
        if len(ids) > len(self._room.h):
            self._room = room_for(self._packing, len(ids))
        # What comes from torch starts at a line already, unless it is a part of something.
        embedded, cosines, sines, kept = (aligned.at_line(t.numpy()) for t in (x, cos, sin, last))
        step = Step(
            embedded, cosines.reshape(-1), sines.reshape(-1), index.places, index.table,
            index.tiles, rows, row_of, starts, kept, logits.numpy(),
        )  # fmt: skip
        run(numba.get_num_threads(), step, self._model, self._packing.packed, self._room)

    def _embed(self, ids: Tensor) -> Tensor:
        if self.embeddings is None:
            return torch.from_numpy(self._packing.rows(len(self._packing.shapes) - 1, ids.numpy()))
        return self.embeddings(ids)

    def _placed(self, layout: Mapping[str, SiteColumns]) -> Array:
        """Returns where each layer's sites lie in the rows, looked up when they changed."""
        if layout != self._layout:
            self._layout = dict(layout)
            paths = [
                [f"model.layers.{layer}.{site}".rstrip(".") for site in SITES]
                for layer in range(len(self._unedited))
            ]
            self._starts = aligned.copied(self._unedited)
            for layer, row in enumerate(paths):
                for site, path in enumerate(row):
                    for part, end in enumerate(("", LAYER_NORM)):
                        if path + end in layout:
                            self._starts[layer, site, part] = layout[path + end].start
        return self._starts


def room_for(packing: Packing, num_tokens: int) -> Room:
    """Returns room for a pass of so many tokens through these products."""
    shapes = packing.shapes
    qkv, hidden, gate_up, inner = shapes[0][0], shapes[0][1], shapes[2][0], shapes[3][1]

    def rows(dim: int) -> Array:
        return aligned.rows(num_tokens, dim, np.float32)

    def narrow(array: Array) -> Array:
        if packing.activation is np.float32:
            return array
        return aligned.rows(num_tokens, packing.padded(array.shape[1]), packing.activation)

    h, attended, gated = rows(hidden), rows(shapes[1][1]), rows(inner)
    parts = packing.num_steps(max(hidden, inner, attended.shape[1]))
    return Room(
        h, rows(qkv), attended, rows(hidden), rows(gate_up), gated,
        narrow(h), narrow(attended), narrow(gated), rows(parts),
        rows(hidden), narrow(rows(attended.shape[1])), rows(parts),
        aligned.zeros(num_tokens, np.int32),
    )  # fmt: skip


def pack(model: Any, precision: str = "fp32", room: Packing | None = None) -> Packing:
    """Returns a copy of the products of all layers, then of the head, in `room` if that fits.

    Raises FailedPreconditionError if this CPU has no products of `precision`.
    """
    groups: list[tuple[Any, ...]] = []
    for a, m in ((layer.self_attn, layer.mlp) for layer in model.model.layers):
        groups += [(a.q_proj, a.k_proj, a.v_proj), (a.o_proj,)]
        groups += [(m.gate_proj, m.up_proj), (m.down_proj,)]
    groups.append((model.lm_head,))
    shapes = [(sum(x.out_features for x in group), group[0].in_features) for group in groups]
    if room is not None and (room.precision, room.shapes) == (precision, shapes):
        packing = room
    else:
        packing = Packing(shapes, precision, head=len(shapes) - 1)
    for i, group in enumerate(groups):
        packing.fill(i, *joined(*group))
    return packing


def _model(
    model: Any,
    layers: Sequence[Any],
    rules: Sequence[LayerRule],
    cache: NumbaKVCache,
) -> Model:
    assert len(cache.stacks) == 1, "layers of a fusable model have one shape"
    keys, values = cache.stacks[0]
    paged = cache.paged[0]
    norms = itertools.chain.from_iterable(
        (layer.input_layernorm, layer.post_attention_layernorm) for layer in layers
    )
    q_norms = [getattr(layer.self_attn, "q_norm", None) for layer in layers]
    k_norms = [getattr(layer.self_attn, "k_norm", None) for layer in layers]
    head_eps = 0.0 if q_norms[0] is None else q_norms[0].variance_epsilon
    query, key = paged.num_heads * paged.head_dim, paged.num_kv_heads * paged.head_dim
    return Model(
        _stacked([*norms, model.model.norm]),
        np.float32(model.model.norm.variance_epsilon),
        _stacked(q_norms),
        _stacked(k_norms),
        np.float32(head_eps),
        keys.reshape(len(layers), -1),
        values.reshape(len(layers), -1),
        aligned.copied(paged.packed_layout),
        aligned.copied(np.array([query, key, key], np.int64)),
        aligned.copied(np.array([rule.scale for rule in rules], np.float32)),
        aligned.copied(np.array([rule.window for rule in rules], np.int64)),
    )


def _stacked(norms: Sequence[Any]) -> Array:
    """Returns the weights of these norms [norms, dim], with dim 0 where there are none."""
    if norms[0] is None:
        return aligned.zeros((len(norms), 0), np.float32)
    return aligned.copied(torch.stack([norm.weight.data.float() for norm in norms]).numpy())
