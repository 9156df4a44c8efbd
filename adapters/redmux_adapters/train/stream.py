"""The order in which one adapter sees its examples."""

import random
from collections.abc import Sequence

# Examples of similar length are put together among so many batches, not in the whole epoch: an
# order by length alone would be the same in every epoch.
_POOL_BATCHES = 32


class BatchStream:
    """Batches of indices for ever: each example once an epoch, in an order drawn anew for each.

    The order depends on the lengths, the batch size and the seed alone, so it is the same whatever
    is trained beside. `position` is all there is to keep: setting it continues there.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.position = 0  # batches taken
        self._lengths = lengths
        self._size = batch_size
        self._seed = seed
        self._epoch = -1
        self._batches: list[list[int]] = []

    @property
    def batches_per_epoch(self) -> int:
        """Number of batches in which every example comes once."""
        return -(-len(self._lengths) // self._size)

    def next(self) -> list[int]:
        """Returns the indices of the next batch."""
        epoch, index = divmod(self.position, self.batches_per_epoch)
        if epoch != self._epoch:
            self._batches, self._epoch = self._draw(epoch), epoch
        self.position += 1
        return self._batches[index]

    def _draw(self, epoch: int) -> list[list[int]]:
        drawn = random.Random(f"{self._seed}/{epoch}")
        order = list(range(len(self._lengths)))
        drawn.shuffle(order)
        size, batches = self._size, []
        for start in range(0, len(order), size * _POOL_BATCHES):
            pool = order[start : start + size * _POOL_BATCHES]
            pool.sort(key=lambda i: self._lengths[i])
            batches += [pool[i : i + size] for i in range(0, len(pool), size)]
        drawn.shuffle(batches)
        return batches
