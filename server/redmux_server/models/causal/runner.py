"""CausalRunner: one forward pass of a causal language model over a packed, ragged step."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from redmux_server.engine.bank import IDENTITY, AdapterBank, SiteColumns
from redmux_server.engine.request import Work
from redmux_server.engine.stepper import Runner
from redmux_server.models.cpu.accelerate import computes_in_torch
from redmux_server.models.cpu.threads import set_threads
from redmux_server.models.editing import Editing, OwnedRows, StepRows, rows_of_tokens, slots_of
from redmux_server.models.kvcache import KVCache, Segment


class Decoder(Protocol):
    """A causal language model over the packed tokens of one step, whose segments are entered."""

    reads_table: bool  # whether it takes OwnedRows, the bank's own table, instead of StepRows

    @property
    def computes_in_torch(self) -> bool:
        """Whether some product is torch's: needs its threads, and may have other bits in a mix."""

    def __call__(
        self, ids: Tensor, positions: Tensor, last: Tensor,
        edits: StepRows | OwnedRows | None, layout: Mapping[str, SiteColumns],
    ) -> Tensor:  # fmt: skip
        """Takes ids and positions [tokens]; returns logits [len(last), vocab] of these rows.

        `edits` are the adapters of the step, None for the base model alone; `layout` tells where
        each site lies in their rows.
        """

    def hidden(
        self, ids: Tensor, positions: Tensor, last: Tensor,
        edits: StepRows | OwnedRows | None, layout: Mapping[str, SiteColumns],
    ) -> Tensor:  # fmt: skip
        """Returns what the logits are made of: the last hidden states [len(last), hidden]."""

    def forget_sites(self) -> None:
        """Makes sites that were edited so far cost nothing until they are edited again."""


class CachedRunner(Runner, Protocol):
    """A runner whose requests hold blocks of a key/value cache."""

    cache: KVCache

    def forget_sites(self) -> None:
        """Makes sites that were edited so far cost nothing until they are edited again."""


def stack_of(model: Any) -> Any:
    """Returns the model below the head: what puts out hidden states."""
    if model.base_model is not model:
        return model.base_model
    # A class whose base is an attribute of another name than it says, such as Llama 4's.
    return next(child for child in model.children() if hasattr(child, "get_input_embeddings"))


class TransformersDecoder:
    """The model as transformers runs it, with a hook at each edited site."""

    reads_table = False

    def __init__(self, model: Any) -> None:
        self._model = model
        self.editing = Editing(model)

    @property
    def computes_in_torch(self) -> bool:
        """See `Decoder`."""
        return computes_in_torch(self._model)

    def forget_sites(self) -> None:
        """Takes the hooks off the model."""
        self.editing.remove()

    def __call__(
        self, ids: Tensor, positions: Tensor, last: Tensor,
        edits: StepRows | OwnedRows | None, layout: Mapping[str, SiteColumns],
    ) -> Tensor:  # fmt: skip
        """See `Decoder`."""
        with self._edited(edits, layout):
            logits: Tensor = self._model(
                input_ids=ids[None], position_ids=positions[None], use_cache=False,
                logits_to_keep=last,
            ).logits[0]  # fmt: skip
        return logits

    def hidden(
        self, ids: Tensor, positions: Tensor, last: Tensor,
        edits: StepRows | OwnedRows | None, layout: Mapping[str, SiteColumns],
    ) -> Tensor:  # fmt: skip
        """See `Decoder`."""
        with self._edited(edits, layout):
            states: Tensor = stack_of(self._model)(
                input_ids=ids[None], position_ids=positions[None], use_cache=False
            ).last_hidden_state[0]
        return states[last]

    def _edited(
        self, edits: StepRows | OwnedRows | None, layout: Mapping[str, SiteColumns]
    ) -> AbstractContextManager[None]:
        assert not isinstance(edits, OwnedRows), "hooks take gathered rows"
        if edits is not None:
            self.editing.install(layout)
        return self.editing.step(edits)


class CausalRunner:
    """Runs the tokens of a step as one row [1, tokens]: no padding, no attention mask."""

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        bank: AdapterBank,
        device: torch.device,
        num_threads: int,
    ) -> None:
        self._decoder = decoder
        self._num_threads = num_threads
        self.cache = cache
        self._bank = bank
        self._device = device

    def enter_thread(self) -> None:
        """Sets the number of compute threads, which is a property of the calling thread."""
        set_threads(self._num_threads, self._decoder.computes_in_torch)

    def forget_sites(self) -> None:
        """See `Decoder`."""
        self._decoder.forget_sites()

    @torch.inference_mode()
    def forward(self, work: Sequence[Work]) -> Tensor:
        """Computes the step and returns [n, vocab] logits, the rows that the work items want.

        Decodes must come first in `work`. Every request holds its cache blocks and bank slot.
        """
        return self._run(work, self._decoder)

    @torch.inference_mode()
    def hidden(self, work: Sequence[Work]) -> Sequence[Tensor]:
        """Computes the step and returns the last hidden states [count, hidden] of each item."""
        states = self._run(work, self._decoder.hidden, wants_all=True)
        return torch.split(states, [item.count for item in work])

    def _run(
        self, work: Sequence[Work], compute: Callable[..., Tensor], wants_all: bool = False
    ) -> Tensor:
        """Returns the rows that the work items want, or with `wants_all` one of each token."""
        segments: list[Segment] = []
        ids: list[int] = []
        positions: list[int] = []
        last: list[int] = []
        for item in work:
            r, first = item.request, item.request.num_computed
            segments.append(Segment(len(ids), item.count, first, r.blocks))
            wanted = range(item.count) if wants_all else item.wanted
            last += [len(ids) + i for i in wanted]
            ids += item.token_ids
            positions += range(first, first + item.count)
        # One row at least: an empty selection is not what every model expects.
        tokens, places, kept = (
            torch.tensor(x, device=self._device) for x in (ids, positions, last or [0])
        )
        with self.cache.step(segments):
            edits = self._rows(work, segments)
            rows = compute(tokens, places, kept, edits, self._bank.layout)
        return rows[: len(last)]

    def _rows(
        self, work: Sequence[Work], segments: Sequence[Segment]
    ) -> StepRows | OwnedRows | None:
        edited = [item.edited for item in work]
        slots = slots_of(work, edited)
        if not any(slots):
            return None
        if self._decoder.reads_table:
            rows = rows_of_tokens(self._bank.table_rows(slots), [s.count for s in segments], edited)
            return OwnedRows(self._bank.table, rows)
        # A one-token prefill is edited like a decode: the arithmetic is the same.
        num_decodes = next((i for i, s in enumerate(segments) if s.count > 1), len(segments))
        prefills = [
            (segments[i].start + edited[i].start, segments[i].start + edited[i].stop, i)
            for i in range(num_decodes, len(segments))
            if slots[i] != IDENTITY
        ]
        return StepRows(self._bank.rows(slots), num_decodes, prefills)
