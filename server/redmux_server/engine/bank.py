"""AdapterBank: the vectors of the adapters in use, one row each, on the model's device."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from redmux_adapters import Edit
from redmux_server.models.editing import SiteColumns

IDENTITY = 0  # slot of the bare base model: scale 1, bias 0


class AdapterBank:
    """One matrix [slots, width]; a row is an adapter's scale and bias of every site in turn.

    Rows are keyed by digest, counted by the requests that use them and reused least recently
    used first once nobody does. The bank grows on demand to `max_bytes`, or to `min_slots` rows
    if those need more, so that every running request can have a row of its own: acquiring never
    fails. Owned by the engine thread; a row is only ever written between two steps.
    """

    def __init__(
        self,
        site_dims: Mapping[str, int],
        *,
        device: torch.device,
        dtype: torch.dtype,
        max_bytes: int,
        min_slots: int,
    ) -> None:
        self._site_dims = site_dims
        self._max_bytes = max_bytes
        self._min_slots = min_slots
        self.layout: dict[str, SiteColumns] = {}
        self._table = torch.zeros((1, 0), device=device, dtype=dtype)  # [slots, width]
        self._slots: OrderedDict[str, int] = OrderedDict()  # digest -> slot, least recent first
        self._users: list[int] = [1]  # per slot; the identity is never free
        self._free: list[int] = []
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
    def nbytes(self) -> int:
        """Size of the matrix in bytes."""
        return self._table.nbytes

    def acquire(self, digest: str, edits: Mapping[str, Edit]) -> int:
        """Returns the slot that holds this adapter and counts the caller as its user."""
        slot = self._slots.get(digest)
        if slot is None:
            self._extend_layout(edits)
            slot = self._take_slot()
            self._fill(slot, edits)
            self._slots[digest] = slot
        self._slots.move_to_end(digest)
        self._users[slot] += 1
        return slot

    def release(self, slot: int) -> None:
        """Ends one use of a slot; its row stays until another adapter needs the place."""
        assert self._users[slot] > 0, f"slot {slot} is not in use"
        self._users[slot] -= 1

    def rows(self, slots: Sequence[int]) -> Tensor:
        """Returns [len(slots), width], the rows of these slots.

        Kept while the composition of the batch stands, so that a decode step gathers nothing.
        """
        key = tuple(slots)
        if self._cached_rows is None or self._cached_rows[0] != key:
            index = torch.tensor(key, device=self._table.device)
            # index_select refuses a negative index, where indexing would read another row.
            self._cached_rows = (key, self._table.index_select(0, index))
        return self._cached_rows[1]

    def _extend_layout(self, edits: Mapping[str, Edit]) -> None:
        fresh = sorted(edits.keys() - self.layout.keys())
        if not fresh:
            return
        width = self._table.shape[1]
        for site in fresh:
            self.layout[site] = SiteColumns(width, self._site_dims[site])
            width = self.layout[site].stop
        self._resize(self.num_slots, width)
        for site in fresh:
            columns = self.layout[site]
            self._table[:, columns.start : columns.start + columns.dim] = 1

    def _take_slot(self) -> int:
        if self._free:
            return self._free.pop()
        row_bytes = self._table.shape[1] * self._table.element_size()
        limit = max(self._min_slots, self._max_bytes // max(1, row_bytes))
        if self.num_slots < limit:
            first = self.num_slots
            self._resize(min(limit, max(8, 2 * first)), self._table.shape[1])
            self._users += [0] * (self.num_slots - first)
            self._free = list(range(self.num_slots - 1, first - 1, -1))
            return self._free.pop()
        digest = next(d for d, slot in self._slots.items() if not self._users[slot])
        return self._slots.pop(digest)

    def _resize(self, num_slots: int, width: int) -> None:
        table = self._table.new_zeros((num_slots, width))
        table[: self._table.shape[0], : self._table.shape[1]] = self._table
        self._table = table
        self._cached_rows = None

    def _fill(self, slot: int, edits: Mapping[str, Edit]) -> None:
        row = torch.zeros(self._table.shape[1])
        for site, columns in self.layout.items():
            middle = columns.start + columns.dim
            edit = edits.get(site)
            row[columns.start : middle] = 1 if edit is None else edit.scale
            if edit is not None:
                row[middle : columns.stop] = edit.bias
        self._table[slot].copy_(row)
        self._cached_rows = None
        self.num_fills += 1
