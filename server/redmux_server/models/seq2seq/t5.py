"""T5: encoder and decoder over packed rows, each sequence at its exact length."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from redmux_server.models.cpu.sequence_attention import NO_BIAS, Panels, attend
from redmux_server.models.cpu.vector import Array

_SCALE = 1.0  # T5 scales its weights instead


@dataclass(frozen=True, slots=True)
class SourceState:
    """What one request keeps: its source for the cross-attention, and its own past.

    One of each per layer of the decoder.
    """

    length: int  # tokens of the source
    cross: Sequence[Panels]
    past: Sequence[Panels]  # as long as the request can ever be


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
        self._biases: dict[str, Array] = {}  # of encoder and decoder, as `attend` takes them

    @property
    def num_layers(self) -> int:
        """Layers of the decoder."""
        return len(self._model.decoder.block)

    def encode(self, ids: Tensor, lengths: Sequence[int], room: Sequence[int]) -> list[SourceState]:
        """Runs the sources ids [tokens], of these lengths, through the encoder.

        Returns what each request keeps, with room for so many tokens of the decoder.
        """
        encoder = self._model.encoder
        bias = self._bias("encoder", max(lengths))
        starts = np.cumsum([0, *lengths])
        h = encoder.embed_tokens(ids)
        for i, block in enumerate(encoder.block):
            attention, feed = block.layer
            path = f"encoder.block.{i}.layer"
            x = attention.layer_norm(h)
            module = attention.SelfAttention
            q, k, v = (self._split(linear(x)) for linear in (module.q, module.k, module.v))
            mixed = self._join(attend(q, k, v, starts, bias, _SCALE))
            h = self._edit(f"{path}.0", h + module.o(mixed))
            h = self._edit(f"{path}.1", h + _feed(feed, h))
        h = encoder.final_layer_norm(h)
        states = [
            SourceState(n, self._panels(n), self._panels(m))
            for n, m in zip(lengths, room, strict=True)
        ]
        for i, block in enumerate(self._model.decoder.block):
            module = block.layer[1].EncDecAttention
            keys, values = (self._split(linear(h)) for linear in (module.k, module.v))
            for state, start, stop in zip(states, starts, starts[1:], strict=False):
                state.cross[i].store(0, keys[start:stop], values[start:stop])
        return states

    def decode(
        self, ids: Tensor, positions: Sequence[int], states: Sequence[SourceState],
        wanted: Sequence[int],
    ) -> Tensor:  # fmt: skip
        """Computes tokens at these positions; returns logits [wanted, vocab] of some of the rows.

        Each has the state of its request; those of one request follow each other.
        """
        decoder = self._model.decoder
        bias = self._bias("decoder", max(positions) + 1)
        h = decoder.embed_tokens(ids)
        for i, block in enumerate(decoder.block):
            attention, crossing, feed = block.layer
            path = f"decoder.block.{i}.layer"
            module = attention.SelfAttention
            x = attention.layer_norm(h)
            q, k, v = (self._split(linear(x)) for linear in (module.q, module.k, module.v))
            outs = np.empty_like(q)
            for r, (position, state) in enumerate(zip(positions, states, strict=True)):
                row, past = slice(r, r + 1), state.past[i]
                past.store(position, k[row], v[row])
                outs[row] = past.attend(q[row], position + 1, bias, position, _SCALE)
            h = self._edit(f"{path}.0", h + module.o(self._join(outs)))
            module = crossing.EncDecAttention
            q = self._split(module.q(crossing.layer_norm(h)))
            for r, state in enumerate(states):
                row = slice(r, r + 1)
                outs[row] = state.cross[i].attend(q[row], state.length, NO_BIAS, 0, _SCALE)
            h = self._edit(f"{path}.1", h + module.o(self._join(outs)))
            h = self._edit(f"{path}.2", h + _feed(feed, h))
        h = decoder.final_layer_norm(h[list(wanted)])
        if getattr(self._model.config, "scale_decoder_outputs", False):  # mT5 never does
            h = h * self._model.config.d_model**-0.5
        logits: Tensor = self._model.lm_head(h)
        return logits

    def _panels(self, length: int) -> list[Panels]:
        """Returns room for the keys and values of so many tokens in every layer of the decoder."""
        return [Panels(self._heads, self._size, length) for _ in range(self.num_layers)]

    def _bias(self, stack: str, longest: int) -> Array:
        """Returns what the scores of up to `longest` tokens are biased by, for each distance."""
        held = self._biases.get(stack)
        if held is None or held.shape[1] < 2 * longest - 1:
            module = getattr(self._model, stack).block[0].layer[0].SelfAttention
            longest = 1 << (longest - 1).bit_length()  # so that it seldom grows
            after = module.compute_bias(1, longest)[0, :, 0]
            before = module.compute_bias(longest, 1)[0, :, :, 0]
            by_distance = torch.cat((before.flip(1)[:, :-1], after), 1)
            held = self._biases[stack] = by_distance.contiguous().numpy()
        return held

    def _split(self, x: Tensor) -> Array:
        """Returns [tokens, heads, head_dim] of x [tokens, heads * head_dim]."""
        split: Array = x.contiguous().view(len(x), self._heads, self._size).numpy()
        return split

    def _join(self, out: Array) -> Tensor:
        """The other way round."""
        return torch.from_numpy(out).view(len(out), self._heads * self._size)


def _feed(layer: Any, h: Tensor) -> Tensor:
    """The FFN of a layer, gated or not."""
    ffn, x = layer.DenseReluDense, layer.layer_norm(h)
    inner = ffn.act(ffn.wi_0(x)) * ffn.wi_1(x) if hasattr(ffn, "wi_0") else ffn.act(ffn.wi(x))
    out: Tensor = ffn.wo(inner)
    return out
