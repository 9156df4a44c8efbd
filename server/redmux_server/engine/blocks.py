"""BlockPool: which blocks of the key/value cache are free."""

from collections.abc import Iterable


class BlockPool:
    """Hands out block ids, most recently freed first, so that memory stays compact and warm."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Returns how many blocks hold this many tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, num_tokens: int) -> list[int] | None:
        """Returns blocks for this many tokens, or None if there are not enough."""
        count = self.blocks_for(num_tokens)
        if count > len(self._free):
            return None
        return [self._free.pop() for _ in range(count)]

    def release(self, blocks: Iterable[int]) -> None:
        """Takes blocks back."""
        self._free.extend(blocks)
        assert len(self._free) <= self.num_blocks, "a block was released twice"
