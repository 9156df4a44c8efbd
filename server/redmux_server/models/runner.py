"""CausalRunner: one forward pass of a causal language model over a packed, ragged step."""

from collections.abc import Sequence
from typing import Any

import numba
import torch
from torch import Tensor

from redmux_server.engine.bank import IDENTITY, AdapterBank
from redmux_server.engine.request import Work
from redmux_server.models.editing import Editing, StepRows
from redmux_server.models.kvcache import KVCache, Segment


class CausalRunner:
    """Runs the tokens of a step as one row [1, tokens]: no padding, no attention mask."""

    def __init__(
        self,
        model: Any,
        cache: KVCache,
        editing: Editing,
        bank: AdapterBank,
        num_threads: int,
    ) -> None:
        self.model = model
        self._num_threads = num_threads
        self.cache = cache
        self._editing = editing
        self._bank = bank

    def enter_thread(self) -> None:
        """Sets the number of compute threads, which is a property of the calling thread."""
        torch.set_num_threads(self._num_threads)
        numba.set_num_threads(min(self._num_threads, numba.config.NUMBA_NUM_THREADS))

    @torch.inference_mode()
    def forward(self, work: Sequence[Work]) -> Tensor:
        """Computes the step and returns [n, vocab] logits, one row per work item that samples.

        Decodes must come first in `work`. Every request holds its cache blocks and bank slot.
        """
        segments: list[Segment] = []
        ids: list[int] = []
        positions: list[int] = []
        last: list[int] = []
        for item in work:
            r, first = item.request, item.request.num_computed
            segments.append(Segment(len(ids), item.count, first, r.blocks))
            ids += r.token_ids[first : first + item.count]
            positions += range(first, first + item.count)
            if item.samples:
                last.append(len(ids) - 1)
        device = self.model.device
        with self.cache.step(segments), self._editing.step(self._rows(work, segments)):
            logits: Tensor = self.model(
                input_ids=torch.tensor([ids], device=device),
                position_ids=torch.tensor([positions], device=device),
                use_cache=False,
                # One row at least: an empty selection is not what every model expects.
                logits_to_keep=torch.tensor(last or [0], device=device),
            ).logits[0]
        return logits[: len(last)]

    def _rows(self, work: Sequence[Work], segments: Sequence[Segment]) -> StepRows | None:
        slots = [IDENTITY if item.request.slot is None else item.request.slot for item in work]
        if not any(slots):
            return None
        self._editing.install(self._bank.layout)
        # A one-token prefill is edited like a decode: the arithmetic is the same.
        num_decodes = next((i for i, s in enumerate(segments) if s.count > 1), len(segments))
        prefills = [
            (s.start, s.start + s.count, i)
            for i, s in enumerate(segments[num_decodes:], num_decodes)
            if slots[i] != IDENTITY
        ]
        return StepRows(self._bank.rows(slots), num_decodes, prefills)
