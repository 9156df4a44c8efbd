"""What becomes of the hidden states of a prompt that is read: one vector, or a head's logits."""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from redmux_adapters import Head
from redmux_server.engine.request import Pooling, Read, Request
from redmux_server.engine.sampling import NonFinite


class HeadProducts(Protocol):
    """Applies the heads of a batch."""

    def logits(self, heads: Sequence[Head], states: Sequence[Tensor]) -> list[Tensor]:
        """Returns the logits [labels] of each request by its head and states [tokens, hidden]."""


class Reader:
    """Pools hidden states, and applies the heads of a batch. Owned by the engine thread."""

    def __init__(self, heads: HeadProducts | None = None) -> None:
        """`heads` is None where no request asks for one."""
        self._heads = heads

    @torch.inference_mode()
    def read(self, requests: Sequence[Request], states: Sequence[Tensor]) -> list[Read | NonFinite]:
        """Returns what each request asks for, from its own states [tokens, hidden] alone."""
        values: dict[Request, Tensor] = {}
        classified = []
        for request, hidden in zip(requests, states, strict=True):
            assert request.reading is not None
            pooling = request.reading.pooling
            if pooling is None:
                classified.append((request, hidden))
                continue
            vector = _pool(hidden.float(), pooling)
            values[request] = F.normalize(vector, dim=0) if request.reading.normalize else vector
        if classified:
            assert self._heads is not None, "nothing applies heads"
            heads = [r.adapter.head for r, _ in classified if r.adapter and r.adapter.head]
            logits = self._heads.logits(heads, [hidden for _, hidden in classified])
            values |= zip((r for r, _ in classified), logits, strict=True)
        return [_checked(values[request]) for request in requests]


def _pool(states: Tensor, pooling: Pooling) -> Tensor:
    if pooling is Pooling.MEAN:
        return states.mean(0)
    return states[0 if pooling is Pooling.CLS else -1]


def _checked(vector: Tensor) -> Read | NonFinite:
    return Read(vector.tolist()) if bool(vector.isfinite().all()) else NonFinite()
