"""T5: encoder and decoder over packed rows, each sequence at its exact length."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SourceState:
    """What one request keeps: its source for the cross-attention, and its own past.

    Keys and values are [heads, length, head_dim], one per layer of the decoder.
    """

    cross: Sequence[tuple[Tensor, Tensor]]
    past: Sequence[tuple[Tensor, Tensor]]  # as long as the request can ever be


class T5:
    """The modules of a transformers T5 as functions of packed rows [tokens, hidden].

    Linears are called as modules, so that hooks edit their outputs. Attention runs sequence by
    sequence: nothing is padded or masked, and no row depends on another request.
    """

    def __init__(self, model: Any, edit: Callable[[str, Tensor], Tensor]) -> None:
        """`edit` takes a path and what a module there would put out, and returns it edited.

        It is asked at the sums with the residual, where no module is called.
        """
        self._model = model
        self._edit = edit
        self._heads: int = model.config.num_heads
        self._size: int = model.config.d_kv

    @property
    def num_layers(self) -> int:
        """Layers of the decoder."""
        return len(self._model.decoder.block)

    def encode(self, ids: Tensor, lengths: Sequence[int], room: Sequence[int]) -> list[SourceState]:
        """Runs the sources ids [tokens], of these lengths, through the encoder.

        Returns what each request keeps, with room for so many tokens of the decoder.
        """
        encoder = self._model.encoder
        bias = encoder.block[0].layer[0].SelfAttention
        biases = [bias.compute_bias(n, n)[0] for n in lengths]  # [heads, n, n]
        h = encoder.embed_tokens(ids)
        for i, block in enumerate(encoder.block):
            attention, feed = block.layer
            path = f"encoder.block.{i}.layer"
            x = attention.layer_norm(h)
            module = attention.SelfAttention
            q, k, v = (self._split(linear(x), lengths) for linear in (module.q, module.k, module.v))
            h = self._edit(f"{path}.0", h + module.o(self._join(map(_attend, q, k, v, biases))))
            h = self._edit(f"{path}.1", h + _feed(feed, h))
        h = encoder.final_layer_norm(h)
        cross = []
        for block in self._model.decoder.block:
            module = block.layer[1].EncDecAttention
            keys, values = (self._split(linear(h), lengths) for linear in (module.k, module.v))
            cross.append([*zip(keys, values, strict=True)])
        return [
            SourceState([layer[i] for layer in cross], [self._empty(n) for _ in cross])
            for i, n in enumerate(room)
        ]

    def decode(
        self, ids: Tensor, positions: Sequence[int], states: Sequence[SourceState],
        wanted: Sequence[int],
    ) -> Tensor:  # fmt: skip
        """Computes tokens at these positions; returns logits [wanted, vocab] of some of the rows.

        Each has the state of its request; those of one request follow each other.
        """
        decoder = self._model.decoder
        ones = [1] * len(states)
        bias = decoder.block[0].layer[0].SelfAttention
        biases = [bias.compute_bias(1, p + 1, past_seen_tokens=p)[0] for p in positions]
        h = decoder.embed_tokens(ids)
        for i, block in enumerate(decoder.block):
            attention, crossing, feed = block.layer
            path = f"decoder.block.{i}.layer"
            module = attention.SelfAttention
            x = attention.layer_norm(h)
            q, k, v = (self._split(linear(x), ones) for linear in (module.q, module.k, module.v))
            outs = []
            for r, (position, state) in enumerate(zip(positions, states, strict=True)):
                keys, values = state.past[i]
                keys[:, position], values[:, position] = k[r][:, 0], v[r][:, 0]
                stop = position + 1
                outs.append(_attend(q[r], keys[:, :stop], values[:, :stop], biases[r]))
            h = self._edit(f"{path}.0", h + module.o(self._join(outs)))
            module = crossing.EncDecAttention
            q = self._split(module.q(crossing.layer_norm(h)), ones)
            outs = [_attend(q[r], *state.cross[i], None) for r, state in enumerate(states)]
            h = self._edit(f"{path}.1", h + module.o(self._join(outs)))
            h = self._edit(f"{path}.2", h + _feed(feed, h))
        h = decoder.final_layer_norm(h[list(wanted)])
        if getattr(self._model.config, "scale_decoder_outputs", False):  # mT5 never does
            h = h * self._model.config.d_model**-0.5
        logits: Tensor = self._model.lm_head(h)
        return logits

    def _empty(self, length: int) -> tuple[Tensor, Tensor]:
        keys, values = torch.zeros(2, self._heads, length, self._size)
        return keys, values

    def _split(self, x: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        """Returns [heads, length, head_dim] of each sequence in x [tokens, heads * head_dim]."""
        heads = x.view(len(x), self._heads, self._size).transpose(0, 1)
        return list(torch.split(heads, list(lengths), 1))

    def _join(self, outs: Any) -> Tensor:
        """The other way round: returns [tokens, heads * head_dim]."""
        return torch.cat(list(outs), 1).transpose(0, 1).reshape(-1, self._heads * self._size)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Attention without scale, as T5 has it; returns [heads, rows, head_dim]."""
    # Copies, so that the layout, and with it the order of summation, never depends on neighbours.
    scores = q.contiguous() @ k.contiguous().transpose(1, 2)
    if bias is not None:
        scores = scores + bias
    return scores.softmax(-1) @ v.contiguous()


def _feed(layer: Any, h: Tensor) -> Tensor:
    """The FFN of a layer, gated or not."""
    ffn, x = layer.DenseReluDense, layer.layer_norm(h)
    inner = ffn.act(ffn.wi_0(x)) * ffn.wi_1(x) if hasattr(ffn, "wi_0") else ffn.act(ffn.wi(x))
    out: Tensor = ffn.wo(inner)
    return out
