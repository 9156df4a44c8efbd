"""EncoderRunner: one forward pass of an encoder over the packed sequences of a step."""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from redmux_server.engine.bank import IDENTITY, AdapterBank
from redmux_server.engine.request import Work
from redmux_server.models.cpu.accelerate import computes_in_torch
from redmux_server.models.cpu.threads import set_threads
from redmux_server.models.editing import Editing, StepRows
from redmux_server.models.encoder.packed_sequences import PackedSequences


class EncoderRunner:
    """Runs whole sequences as one row [1, tokens]: no padding, no attention mask."""

    def __init__(
        self, model: Any, attention: PackedSequences, bank: AdapterBank, num_threads: int
    ) -> None:
        """`attention` is what `attach_packed` has given the model."""
        self._model = model
        self._attention = attention
        self._bank = bank
        self._num_threads = num_threads
        self._editing = Editing(model)
        embeddings = getattr(model, "embeddings", None)  # EuroBERT rotates instead
        # RoBERTa and MPNet count positions from behind this token's id, and put the token there.
        self._padding_id: int | None = getattr(embeddings, "padding_idx", None)
        types = getattr(embeddings, "token_type_embeddings", None)
        self._has_types = types is not None and types.num_embeddings > 1

    def enter_thread(self) -> None:
        """Sets the number of compute threads, which is a property of the calling thread."""
        set_threads(self._num_threads, computes_in_torch(self._model))

    def forget_sites(self) -> None:
        """Makes sites that were edited so far cost nothing until they are edited again."""
        self._editing.remove()

    def forward(self, work: Sequence[Work]) -> NoReturn:
        """An encoder has no logits to draw a token from."""
        raise AssertionError("an encoder generates nothing")

    @torch.inference_mode()
    def hidden(self, work: Sequence[Work]) -> list[Tensor]:
        """Returns the last hidden states [tokens, hidden] of each item, which is a whole prompt."""
        ids: list[int] = []
        positions: list[int] = []
        types: list[int] = []
        starts = [0]
        for item in work:
            request = item.request
            assert item.count == len(request.prompt_ids), "an encoder reads whole prompts"
            ids += request.prompt_ids
            positions += positions_of(request.prompt_ids, self._padding_id)
            of_request = request.reading.type_ids if request.reading else None
            types += of_request or [0] * item.count
            starts.append(len(ids))
        names = ["input_ids", "position_ids", *(["token_type_ids"] if self._has_types else [])]
        device = self._model.device
        inputs = {
            name: torch.tensor([values], device=device)
            for name, values in zip(names, (ids, positions, types), strict=False)
        }
        edits = self._rows(work, starts)
        if edits is not None:
            self._editing.install(self._bank.layout)
        with self._attention.step(starts), self._editing.step(edits):
            states: Tensor = self._model(**inputs).last_hidden_state[0]
        return list(torch.split(states, [item.count for item in work]))

    def _rows(self, work: Sequence[Work], starts: Sequence[int]) -> StepRows | None:
        slots = [IDENTITY if item.request.slot is None else item.request.slot for item in work]
        if not any(slots):
            return None
        prefills = [
            (starts[i], starts[i + 1], i) for i, slot in enumerate(slots) if slot != IDENTITY
        ]
        return StepRows(self._bank.rows(slots), 0, prefills)


def positions_of(ids: Sequence[int], padding_id: int | None) -> list[int]:
    """Returns the position of each token, as the model's own embeddings would count them."""
    if padding_id is None:
        return list(range(len(ids)))
    positions, place = [], padding_id
    for token_id in ids:
        place += token_id != padding_id
        positions.append(place if token_id != padding_id else padding_id)
    return positions
