"""Attention of an encoder over packed sequences, and the encoders that can be given it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from redmux.errors import FailedPreconditionError
from redmux_server.models.cpu.sequence_attention import NO_BIAS, attend

_NAME = "redmux_packed"


class PackedSequences:
    """Full attention inside each of the sequences that lie one behind the other in a step.

    Each is computed at its exact length. In fp32 on a CPU its result has the same bits whatever
    stands beside it.
    """

    def __init__(self) -> None:
        self._starts: Sequence[int] = ()  # of each sequence, and the end of the last
        self.num_calls = 0
        # [heads, 2 * longest - 1] added to the scores by the distance of key and query
        self.bias: Tensor | None = None

    @contextmanager
    def step(self, starts: Sequence[int]) -> Iterator[None]:
        """Lets sequence i be the tokens from starts[i] to starts[i + 1] inside the block."""
        self._starts = starts
        try:
            yield
        finally:
            self._starts = ()

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Takes [1, heads, tokens, head size]; returns [1, tokens, heads, head size]."""
        self.num_calls += 1
        if query.device.type == "cpu" and query.dtype == torch.float32:
            return self._exact(query, key, value, scale)
        parts = []
        for start, stop in pairwise(self._starts):
            q, k, v = (x[:, :, start:stop] for x in (query, key, value))
            part = F.scaled_dot_product_attention(
                q, k, v, attn_mask=self._mask(stop - start), scale=scale
            )
            parts.append(part.transpose(1, 2))
        return torch.cat(parts, 1)

    def _exact(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        q, k, v = (x[0].transpose(0, 1).contiguous().numpy() for x in (query, key, value))
        bias = NO_BIAS if self.bias is None else self.bias.numpy()
        return torch.from_numpy(attend(q, k, v, np.array(self._starts), bias, scale))[None]

    def _mask(self, length: int) -> Tensor | None:
        """Returns the bias [1, heads, length, length] of one sequence."""
        if self.bias is None:
            return None
        longest = self.bias.shape[1] // 2 + 1
        windows = self.bias.unfold(1, length, 1)  # [heads, starts, length]
        return windows[:, longest - length : longest].flip(1)[None]


def attach_packed(model: Any, max_context: int) -> PackedSequences:
    """Makes an encoder run its attention over packed sequences, and returns that attention.

    Raises FailedPreconditionError for an architecture that runs it in another way than through
    transformers' attention interface. MPNet does so, and is given modules of ours.
    """
    attention = PackedSequences()
    if model.config.model_type == "mpnet":
        _attach_mpnet(model, attention, max_context)
    else:
        _attach_interface(model, attention)
    num_layers = model.config.num_hidden_layers
    with torch.inference_mode(), attention.step([0, 2]):
        ids = torch.tensor([[0, 1]], device=model.device)
        model(input_ids=ids, position_ids=ids)
    if attention.num_calls != num_layers:
        raise _unsupported(
            model,
            f"{attention.num_calls} of its {num_layers} layers ran their attention through "
            f"transformers' attention interface",
        )
    return attention


def _attach_interface(model: Any, attention: PackedSequences) -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, _dispatch)
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.redmux_attention = attention
    try:
        model.set_attn_implementation(_NAME)
    except (AttributeError, ValueError) as err:
        raise _unsupported(model, str(err)) from err


def _dispatch(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None,
    *, scaling: float | None = None, sliding_window: int | None = None, **_: object,
) -> tuple[Tensor, None]:  # fmt: skip
    """The attention function that transformers calls."""
    if sliding_window or module.is_causal:  # the start-up check is too short to notice a window
        raise _unsupported(module, "some layer does not attend to all tokens of the input")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return module.redmux_attention(query, key, value, scale), None


def _unsupported(module: Any, why: str) -> FailedPreconditionError:
    return FailedPreconditionError(
        f"encoder architecture {module.config.model_type!r} cannot be served: {why}"
    )


class _MPNetSelfAttention(nn.Module):
    """MPNet's own self-attention, with its projections at their paths and our attention inside."""

    def __init__(self, original: Any, attention: PackedSequences) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = original.q, original.k, original.v, original.o
        self._head_size = original.attention_head_size
        self._attention = attention

    def forward(self, hidden_states: Tensor, *_: object, **__: object) -> tuple[Tensor]:
        shape = (*hidden_states.shape[:-1], -1, self._head_size)
        q, k, v = (f(hidden_states).view(shape).transpose(1, 2) for f in (self.q, self.k, self.v))
        attended = self._attention(q, k, v, self._head_size**-0.5)
        return (self.o(attended.flatten(2)),)


@torch.inference_mode()
def _attach_mpnet(model: Any, attention: PackedSequences, max_context: int) -> None:
    """Its bias depends on the distance of two tokens alone."""
    encoder = model.encoder
    longest = torch.empty(1, max_context, 1, device=model.device)
    bias = encoder.compute_position_bias(longest).to(model.dtype)[0]  # [heads, query, key]
    attention.bias = torch.cat((bias[:, :, 0].flip(1)[:, :-1], bias[:, 0]), 1)
    encoder.compute_position_bias = lambda hidden_states: None
    for layer in encoder.layer:
        layer.attention.attn = _MPNetSelfAttention(layer.attention.attn, attention)
