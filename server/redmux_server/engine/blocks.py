"""BlockPool: who uses which blocks of the key/value cache, and which of them are worth keeping."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from redmux_server.engine.prefix import PrefixIndex


class BlockPool:
    """Hands out block ids, counts their users and keeps shared blocks for as long as it can.

    A block that was shared can have several users. Once it has none it is idle: it stays findable,
    but counts as free and is handed out when no other is left, least recently used first. Users
    of a block use all blocks before it as well, and give back the last first: so a block is always
    handed out before the ones that it continues. Other blocks are handed out most recently freed
    first, so that memory stays compact and warm.
    """

    def __init__(self, num_blocks: int, block_size: int, max_idle: int | None = None) -> None:
        """`max_idle` bounds the idle blocks; those that are one too many are no longer findable."""
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._max_idle = num_blocks if max_idle is None else max_idle
        self._num_users = [0] * num_blocks
        self._index = PrefixIndex()

    @property
    def num_free(self) -> int:
        """Blocks that nobody uses, idle ones included."""
        return len(self._free) + len(self._idle)

    @property
    def num_unused(self) -> int:
        """Blocks that nobody uses and that hold nothing for later prompts."""
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Returns how many blocks hold this many tokens."""
        return -(-num_tokens // self.block_size)

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """Returns the shared blocks of the longest known beginning of a chain of keys."""
        return self._index.find(keys)

    def allocate(self, num_tokens: int, found: Sequence[int] = ()) -> list[int] | None:
        """Returns blocks for this many tokens, or None if there are not enough.

        The first of them are `found`, just returned by `find`; only the others may be written.
        """
        needed = self.blocks_for(num_tokens)
        if self.num_missing(needed, found):
            return None
        for block in found:
            self._use(block)
        return [*found, *(self._take() for _ in range(needed - len(found)))]

    def num_missing(self, needed: int, found: Sequence[int] = ()) -> int:
        """Returns how many blocks would have to be free beside those that are.

        `needed` are all that are to be used, those that `find` has just returned included.
        """
        num_idle = sum(block in self._idle for block in found)
        return max(0, needed - len(found) + num_idle - self.num_free)

    def num_sole(self, blocks: Iterable[int]) -> int:
        """Returns how many of a user's blocks nobody else uses."""
        return sum(self._num_users[block] == 1 for block in blocks)

    def share(self, block: int, key: bytes) -> int:
        """Makes a full block of the caller's findable and returns the one to use from now on.

        That is another if one with the same content is findable already; this one is freed then.
        """
        known = self._index.get(key)
        if known is None:
            self._index.add(key, block)
            return block
        if known != block:
            self._use(known)
            self.release([block])
        return known

    def forget(self, blocks: Iterable[int]) -> None:
        """Makes those of the caller's blocks that nobody else uses no longer findable."""
        for block in blocks:
            if self._num_users[block] == 1:
                self._index.drop(block)

    def release(self, blocks: Sequence[int]) -> None:
        """Takes blocks of one user back, in the order of their positions."""
        for block in reversed(blocks):
            assert self._num_users[block] > 0, f"block {block} was released twice"
            self._num_users[block] -= 1
            if self._num_users[block]:
                continue
            if block in self._index:
                self._idle[block] = None
            else:
                self._free.append(block)
        while len(self._idle) > self._max_idle:
            self._free.append(self._forget_oldest())

    def _use(self, block: int) -> None:
        self._idle.pop(block, None)
        self._num_users[block] += 1

    def _take(self) -> int:
        block = self._free.pop() if self._free else self._forget_oldest()
        self._num_users[block] = 1
        return block

    def _forget_oldest(self) -> int:
        block, _ = self._idle.popitem(last=False)
        self._index.drop(block)
        return block
