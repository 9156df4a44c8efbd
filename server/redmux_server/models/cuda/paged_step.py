"""The index tensors of one step over a paged cache: built on the host, copied in one piece."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from redmux_server.models.kvcache import Segment

Ints = np.ndarray  # int32


@dataclass(frozen=True, slots=True, eq=False)
class HostIndex:
    """Where n requests with T tokens in all lie, as int32 arrays on the host.

    The first `num_decodes` requests have one token each.
    """

    num_decodes: int
    counts: Ints  # [n] tokens of each request in this step
    key_counts: Ints  # [n] keys of each request, those of this step included
    blocks: Ints  # [n, width] cache blocks in order of position; 0 where a request has no more;
    # those behind a request's last key are nobody's business yet
    slots: Ints  # [T] where each token's key goes: block * block_size + offset

    @staticmethod
    def of(segments: Sequence[Segment], block_size: int) -> "HostIndex":
        """Returns the index of these segments, which follow one another from row 0."""
        counts = np.array([s.count for s in segments], np.int32)
        key_counts = np.array([s.position + s.count for s in segments], np.int32)
        blocks = block_table([s.blocks for s in segments])
        blocks = blocks[:, : -(-int(key_counts.max()) // block_size)]
        request = np.repeat(np.arange(len(segments)), counts)
        positions = np.concatenate([np.arange(s.position, s.position + s.count) for s in segments])
        slots = blocks[request, positions // block_size] * block_size + positions % block_size
        num_decodes = next((i for i, n in enumerate(counts) if n > 1), len(counts))
        return HostIndex(num_decodes, counts, key_counts, blocks, slots.astype(np.int32))

    @staticmethod
    def of_decodes(positions: Ints, blocks: Ints, block_size: int) -> "HostIndex":
        """Returns the index of one token per request, at `positions` [n]."""
        n = len(positions)
        slots = blocks[np.arange(n), positions // block_size] * block_size + positions % block_size
        return HostIndex(n, np.ones(n, np.int32), positions + 1, blocks, slots.astype(np.int32))

    def arrays(self) -> tuple[Ints, ...]:
        """Returns what the device needs: slots, starts, key counts, blocks."""
        starts = np.concatenate([[0], np.cumsum(self.counts)]).astype(np.int32)
        return self.slots, starts, self.key_counts, self.blocks


@dataclass(frozen=True, slots=True, eq=False)
class PagedStep:
    """A step as attention sees it: the host's index and its tensors on the device.

    `max_keys` bounds the keys of a request. In a static step the tensors are buffers that a CUDA
    graph reads, and `host` says what they will hold at its next replay.
    """

    host: HostIndex
    slots: Tensor  # [T] int64
    starts: Tensor  # [n + 1] int32, first token of each request
    key_counts: Tensor  # [n] int32
    blocks: Tensor  # [n, width] int32
    max_count: int
    max_keys: int
    is_static: bool = False

    @staticmethod
    def of(host: HostIndex, tensors: Sequence[Tensor]) -> "PagedStep":
        """Returns the step whose `host.arrays()` these int32 tensors hold."""
        slots, starts, key_counts, blocks = tensors
        return PagedStep(
            host, slots.long(), starts, key_counts, blocks,
            max_count=int(host.counts.max()), max_keys=int(host.key_counts.max()),
        )  # fmt: skip


def block_table(blocks: Sequence[Sequence[int]]) -> Ints:
    """Returns [n, width] of n requests' blocks, with 0 where a request has no more."""
    table = np.zeros((len(blocks), max(map(len, blocks))), np.int32)
    for row, own in zip(table, blocks, strict=True):
        row[: len(own)] = own
    return table


class BlockTable:
    """The block table of the steps of a batch, of which each makes anew only what has changed."""

    def __init__(self) -> None:
        self._blocks: list[Sequence[int]] = []
        self._table: Ints = np.zeros((0, 0), np.int32)

    def of(self, blocks: Sequence[Sequence[int]]) -> Ints:
        """Returns what `block_table` returns, perhaps wider, until the next call.

        The blocks of a request must not change in place: others are another list.
        """
        if len(blocks) != len(self._table) or max(map(len, blocks)) > self._table.shape[1]:
            self._table = block_table(blocks)
        else:
            for row, known, own in zip(self._table, self._blocks, blocks, strict=True):
                if own is not known:
                    row[: len(own)] = own
                    row[len(own) :] = 0
        self._blocks = list(blocks)
        return self._table


def to_device(arrays: Sequence[Ints], device: torch.device) -> list[Tensor]:
    """Copies int32 arrays to the device in one transfer and returns them in their shapes."""
    flat = staged(arrays, device).to(device, non_blocking=True)
    return split(flat, [a.shape for a in arrays])


def staged(arrays: Sequence[Ints], device: torch.device) -> Tensor:
    """Returns the arrays as one flat tensor on the host, from where copies need no waiting."""
    flat = torch.from_numpy(np.concatenate([a.ravel() for a in arrays]))
    # Pinned memory is torch's own, which gives it to nobody else until the copy is done.
    return flat.pin_memory() if device.type == "cuda" else flat


def split(flat: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Returns the parts of a flat tensor as views in these shapes."""
    parts = torch.split(flat, [math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
