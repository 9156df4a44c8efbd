"""Seq2SeqRunner: steps of an encoder-decoder model for requests with different adapters."""

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from redmux_server.engine.bank import IDENTITY, AdapterBank
from redmux_server.engine.request import Request, Work
from redmux_server.models.cpu.threads import set_threads
from redmux_server.models.editing import Editing, StepRows
from redmux_server.models.seq2seq.t5 import T5, SourceState


class Seq2SeqRunner:
    """Encodes the sources of new requests packed, then computes tokens of the decoder.

    What is kept of a request goes once it stops running. Every token of the decoder is a row of its
    own, so where several of one request share a step each is computed as if alone.
    """

    def __init__(self, model: T5, editing: Editing, bank: AdapterBank, num_threads: int) -> None:
        self._model = model
        self._editing = editing
        self._bank = bank
        self._num_threads = num_threads

    def enter_thread(self) -> None:
        """Sets the number of compute threads, which is a property of the calling thread."""
        set_threads(self._num_threads, computes_in_torch=False)

    @torch.inference_mode()
    def forward(self, work: Sequence[Work]) -> Tensor:
        """Computes the step and returns [n, vocab] logits, the rows that the work items want."""
        fresh = [item.request for item in work if item.request.kept is None]
        if fresh:
            self._encode(fresh)
        ids: list[int] = []
        positions: list[int] = []
        wanted: list[int] = []
        states: list[SourceState] = []
        for item in work:
            r = item.request
            places = range(r.num_computed, r.num_computed + item.count)
            wanted += [len(ids) + i for i in item.wanted]
            ids += r.token_ids[places.start : places.stop]
            positions += places
            assert isinstance(r.kept, SourceState)
            states += [r.kept] * item.count
        rows = self._rows([item.request for item in work], [item.count for item in work])
        with self._editing.step(rows):
            return self._model.decode(torch.tensor(ids), positions, states, wanted)

    def hidden(self, work: Sequence[Work]) -> NoReturn:
        """Nothing is read off an encoder-decoder yet."""
        raise AssertionError("an encoder-decoder reads nothing")

    def _encode(self, requests: Sequence[Request]) -> None:
        lengths = [len(r.source_ids) for r in requests]
        room = [len(r.prompt_ids) + r.max_tokens for r in requests]
        ids = torch.tensor([i for r in requests for i in r.source_ids])
        with self._editing.step(self._rows(requests, lengths)):
            states = self._model.encode(ids, lengths, room)
        for request, state in zip(requests, states, strict=True):
            request.kept = state

    def _rows(self, requests: Sequence[Request], lengths: Sequence[int]) -> StepRows | None:
        slots = [IDENTITY if r.slot is None else r.slot for r in requests]
        if not any(slots):
            return None
        self._editing.install(self._bank.layout)
        rows = self._bank.rows(slots)
        if max(lengths) == 1:
            return StepRows(rows, len(slots), [])
        stops = torch.tensor(lengths).cumsum(0).tolist()
        spans = [(stop - n, stop, i) for i, (n, stop) in enumerate(zip(lengths, stops, strict=True))
                 if slots[i] != IDENTITY]  # fmt: skip
        return StepRows(rows, 0, spans)
