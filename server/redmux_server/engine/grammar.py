"""Matcher: where a completion stands in its grammar, and which tokens may follow there."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
from llguidance import LLExecutor, LLMatcher
from numpy.typing import NDArray

if TYPE_CHECKING:  # the scheduler knows matchers, but not torch
    from torch import Tensor

Mask = NDArray[np.uint8]  # bit i % 8 of byte i // 8: token i may follow

# Makes -inf of the logits [n, vocab] of tokens that masks bar, one mask for each of these rows, in
# place. Infinity is taken from them, so that what is not finite stays so: nothing is hidden.
Bar = Callable[["Tensor", Sequence[int], Sequence[Mask]], None]


class Matcher:
    """Where one completion stands in its grammar.

    Belongs to whoever makes it until its request is submitted, then to the engine thread, which
    lends it to a MaskThread for the length of a pass.
    """

    __slots__ = ("error", "mask", "num_bytes", "state")

    def __init__(self, state: LLMatcher, mask: Mask) -> None:
        """`state` is nobody else's, and `mask` what may follow in it."""
        self.state = state
        self.mask: Mask | None = mask  # None until it is computed for a new place
        self.num_bytes = len(mask)
        self.error = ""  # what llguidance holds against a token or a place, for good

    def copy(self) -> "Matcher":
        """Returns another one that stands at the beginning, for another completion."""
        assert self.mask is not None
        return Matcher(self.state.deep_copy(), self.mask)

    def take(self, token_id: int) -> None:
        """Goes on by a token. What may follow is still to compute then."""
        self.mask = None
        self.state.consume_token(token_id)
        self._look()

    def fill(self, mask: Mask) -> None:
        """Takes over what may follow: nothing, where computing it has failed."""
        self._look()
        self.mask = np.zeros_like(mask) if self.error else mask

    @property
    def is_complete(self) -> bool:
        """Whether nothing may follow but the end."""
        return not self.error and self.state.is_stopped()

    def _look(self) -> None:
        # llguidance raises nothing: a matcher in error looks like one that is complete.
        if self.state.is_error():
            self.error = first_line(self.state.get_error())


class MaskThread:
    """Computes masks beside the model's pass, all of a step in one call without Python's lock."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "masks")  # starts with its first work
        self._executor: LLExecutor | None = None

    def begin(self, matchers: Sequence[Matcher]) -> "Future[None]":
        """Begins to compute the masks of matchers of one model, which are its own until then."""
        return self._thread.submit(self._fill, matchers)

    def _fill(self, matchers: Sequence[Matcher]) -> None:
        if self._executor is None:
            self._executor = LLExecutor(1)
        words = np.zeros((len(matchers), matchers[0].num_bytes // 4), np.uint32)
        self._executor.unsafe_compute_mask_ptr(
            [(matcher.state, i) for i, matcher in enumerate(matchers)],
            words.ctypes.data, words.strides[0], len(matchers),
        )  # fmt: skip
        for matcher, row in zip(matchers, words, strict=True):
            matcher.fill(row.view(np.uint8))


def allows(mask: Mask, token_id: int) -> bool:
    """Returns whether a token may follow."""
    return bool(mask[token_id >> 3] >> (token_id & 7) & 1)


def apply_masks(logits: "Tensor", masks: Sequence[Mask | None], bar: Bar) -> None:
    """Bars tokens of the rows of logits [rows, vocab] that have a mask, and touches no others."""
    barred = {i: mask for i, mask in enumerate(masks) if mask is not None}
    if barred:
        bar(logits, [*barred], [*barred.values()])


def bar_tokens(logits: "Tensor", rows: Sequence[int], masks: Sequence[Mask]) -> None:
    """Bars tokens as `Bar` has it, on any device and in any precision."""
    import torch

    device = logits.device
    with torch.inference_mode():  # as the logits were computed
        packed = torch.from_numpy(np.stack(masks)).to(device)
        bits = packed[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=device) & 1
        taken = torch.where(bits.flatten(1)[:, : logits.shape[1]] == 1, 0.0, torch.inf)
        logits[[*rows]] -= taken.to(logits.dtype)


_MOST_TOLD = 500  # characters


def first_line(error: str) -> str:
    """Returns what llguidance says, without the grammar's state, which its further lines hold."""
    return error.partition("\n")[0][:_MOST_TOLD]
