"""AdapterBank: the vectors of the adapters in use, one row each, on the model's device."""

import itertools
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from redmux_adapters import Edit
from redmux_adapters.bases.sites import LAYER_NORM

IDENTITY = 0  # slot of the bare base model: scale 1, bias 0


@dataclass(frozen=True, slots=True)
class SiteColumns:
    """Where a site's vectors lie in a row of the adapter bank.

    Of the LayerNorm behind an edit these are its weight and bias, and a switch behind them tells
    whether the row's adapter has it at all.
    """

    start: int
    dim: int
    is_norm: bool = False

    @property
    def stop(self) -> int:
        """One past the last column."""
        return self.start + 2 * self.dim + self.is_norm

    def scale_of(self, rows: Tensor) -> Tensor:
        """Returns the scales [requests, dim] in rows [requests, width]."""
        return rows[:, self.start : self.start + self.dim]

    def bias_of(self, rows: Tensor) -> Tensor:
        """Returns the biases [requests, dim] in rows [requests, width]."""
        return rows[:, self.start + self.dim : self.start + 2 * self.dim]

    def switch_of(self, rows: Tensor) -> Tensor:
        """Returns the switches [requests] in rows [requests, width]; of a LayerNorm only."""
        assert self.is_norm
        return rows[:, self.stop - 1]


class AdapterBank:
    """One matrix [rows, width]; a row is an adapter's scale and bias of every site in turn.

    Where a site is the LayerNorm behind an edit, a switch follows: 1 for adapters that have it.

    An adapter that is acquired gets a slot, keyed by its digest and counted by the requests that
    use it; once nobody does, its row is kept until another adapter needs the place, least recently
    acquired first. Slots are handles: a number never comes twice, so that a stale one cannot read
    what belongs to another adapter. The bank grows on demand to `max_bytes`, or to `min_slots` rows
    if those need more, so that every running request can have a row of its own: acquiring never
    fails. Owned by the engine thread; rows are only ever written between two steps.

    A bank that is `preallocated` has all its rows from the start, so its table keeps its address
    until an adapter brings sites that no adapter had. It then lays out all sites of their kind
    (those whose paths differ only in numbers), so that this happens at most once per kind.
    """

    def __init__(
        self,
        site_dims: Mapping[str, int],
        *,
        device: torch.device,
        dtype: torch.dtype,
        max_bytes: int,
        min_slots: int,
        preallocated: bool = False,
    ) -> None:
        self._site_dims = site_dims
        self._max_bytes = max_bytes
        self._min_slots = min_slots
        self._is_preallocated = preallocated
        self.layout: dict[str, SiteColumns] = {}
        self._table = torch.zeros((1, 0), device=device, dtype=dtype)  # [rows, width]
        self._slots: OrderedDict[str, int] = OrderedDict()  # digest -> slot, least recent first
        self._rows: dict[int, int] = {IDENTITY: 0}  # slot -> row of the matrix
        self._users: dict[int, int] = {}  # slot -> requests that use it
        self._free: list[int] = []  # rows
        self._numbers = itertools.count(IDENTITY + 1)
        self._cached_rows: tuple[tuple[int, ...], Tensor] | None = None
        self.num_fills = 0

    @property
    def num_slots(self) -> int:
        """Rows of the matrix, the identity included."""
        return self._table.shape[0]

    @property
    def num_resident(self) -> int:
        """Adapters that have a row now."""
        return len(self._slots)

    @property
    def num_uses(self) -> int:
        """Acquisitions that were not released yet."""
        return sum(self._users.values())

    @property
    def nbytes(self) -> int:
        """Size of the matrix in bytes."""
        return self._table.nbytes

    @property
    def table(self) -> Tensor:
        """The matrix [rows, width] itself; another object once it has moved."""
        return self._table

    def reserve(self, sites: Iterable[str]) -> None:
        """Lays out these sites before any adapter brings them."""
        self._extend_layout(sites)

    def holds(self, digest: str) -> bool:
        """Whether this adapter has a row."""
        return digest in self._slots

    def acquire(self, digest: str, edits: Mapping[str, Edit]) -> int:
        """Returns the slot that holds this adapter and counts the caller as its user."""
        slot = self._slots.get(digest)
        if slot is None:
            self._extend_layout(edits)
            row = self._take_row()
            self._fill(row, edits)
            slot = self._slots[digest] = next(self._numbers)
            self._rows[slot] = row
            self._users[slot] = 0
        self._slots.move_to_end(digest)
        self._users[slot] += 1
        return slot

    def release(self, slot: int) -> None:
        """Ends one use of a slot; its row stays until another adapter needs the place."""
        assert self._users.get(slot, 0) > 0, f"slot {slot} is not in use"
        self._users[slot] -= 1

    def rows(self, slots: Sequence[int]) -> Tensor:
        """Returns [len(slots), width], the vectors of these slots; raises KeyError for no slot.

        Kept while the composition of the batch stands, so that a decode step gathers nothing.
        """
        key = tuple(slots)
        if self._cached_rows is None or self._cached_rows[0] != key:
            index = torch.tensor([self._rows[slot] for slot in key], device=self._table.device)
            self._cached_rows = (key, self._table.index_select(0, index))
        return self._cached_rows[1]

    def table_rows(self, slots: Sequence[int]) -> list[int]:
        """Returns the row of the table that each slot has now; raises KeyError for no slot."""
        return [self._rows[slot] for slot in slots]

    def _extend_layout(self, sites: Iterable[str]) -> None:
        """Makes place for the sites that no adapter had yet, within the same bytes."""
        fresh = sorted(set(sites) - self.layout.keys())
        if fresh and self._is_preallocated:
            kinds = {_kind(site) for site in fresh}
            fresh = sorted(
                s for s in self._site_dims.keys() - self.layout.keys() if _kind(s) in kinds
            )
        if not fresh:
            return
        width = self._table.shape[1]
        for site in fresh:
            is_norm = site.endswith(LAYER_NORM)
            self.layout[site] = SiteColumns(width, self._site_dims[site], is_norm)
            width = self.layout[site].stop
        while self.num_resident + 1 >= self._limit(width) and self._evict() is not None:
            pass
        kept = [0, *(self._rows[slot] for slot in self._slots.values())]
        num_rows = self._limit(width) if self._is_preallocated else len(kept)
        table = self._table.new_zeros((num_rows, width))
        table[: len(kept), : self._table.shape[1]] = self._table[kept]
        for site in fresh:
            self.layout[site].scale_of(table)[:] = 1
        self._table = table
        self._rows = {slot: row for row, slot in enumerate([IDENTITY, *self._slots.values()])}
        self._free = list(range(num_rows - 1, len(kept) - 1, -1))
        self._cached_rows = None

    def _limit(self, width: int) -> int:
        """How many rows of this width the bank may have."""
        row_bytes = max(1, width * self._table.element_size())
        return max(self._min_slots, self._max_bytes // row_bytes)

    def _take_row(self) -> int:
        if not self._free:
            first, width = self._table.shape
            limit = self._limit(width)
            if first >= limit:
                row = self._evict()
                assert row is not None, "more users than min_slots"
                return row
            table = self._table.new_zeros((min(limit, max(8, 2 * first)), width))
            table[:first] = self._table
            self._table = table
            self._free = list(range(table.shape[0] - 1, first - 1, -1))
        return self._free.pop()

    def _evict(self) -> int | None:
        """Frees the row of the least recent adapter that nobody uses, and returns it."""
        for digest, slot in self._slots.items():
            if not self._users[slot]:
                del self._slots[digest], self._users[slot]
                return self._rows.pop(slot)
        return None

    def _fill(self, row: int, edits: Mapping[str, Edit]) -> None:
        values = torch.zeros(1, self._table.shape[1])
        for site, columns in self.layout.items():
            edit = edits.get(site)
            columns.scale_of(values)[:] = 1 if edit is None else edit.scale
            if edit is not None:
                columns.bias_of(values)[:] = edit.bias
                if columns.is_norm:
                    columns.switch_of(values)[:] = 1
        self._table[row].copy_(values[0])
        self.num_fills += 1


def _kind(site: str) -> str:
    return re.sub(r"\d+", "N", site)
