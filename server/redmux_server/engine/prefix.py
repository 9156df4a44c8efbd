"""PrefixIndex: which cache blocks hold which beginnings of which prompts."""

from array import array
from collections.abc import Iterable, Sequence
from hashlib import blake2b


class PrefixIndex:
    """Finds a full cache block by its key, and forgets it.

    A key stands for everything that the keys and values in a block depend on: whose they are, all
    tokens from the first one on, and which adapter edits which of them. It is a 256-bit
    cryptographic digest, so that equal keys mean equal content even if somebody tries to make it
    otherwise.
    """

    def __init__(self) -> None:
        self._blocks: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}  # the other way round

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, block: int) -> bool:
        return block in self._keys

    def get(self, key: bytes) -> int | None:
        """Returns the block of this key, or None if there is none."""
        return self._blocks.get(key)

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """Returns the blocks of the longest beginning of a chain of keys that is known."""
        found: list[int] = []
        for key in keys:
            block = self._blocks.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def add(self, key: bytes, block: int) -> None:
        """Makes a block findable; neither it nor its key may be known already."""
        assert key not in self._blocks
        assert block not in self._keys
        self._blocks[key] = block
        self._keys[block] = key

    def drop(self, block: int) -> None:
        """Forgets a block; harmless if it is not known."""
        key = self._keys.pop(block, None)
        if key is not None:
            del self._blocks[key]


def extend_keys(
    keys: list[bytes],
    owner: str,
    adapter_digest: str,
    edited: range,
    token_ids: Sequence[int],
    block_size: int,
    num_tokens: int,
) -> None:
    """Appends the keys of the full blocks among the first `num_tokens` tokens that have none yet.

    Each key is the digest of the key before it, of its block's tokens and of what edits them: the
    adapter's digest, empty for the base model, at the positions `edited`. So a beginning that no
    adapter edits has the same keys for all that an owner asks.
    """
    for start in range(len(keys) * block_size, num_tokens - block_size + 1, block_size):
        first = max(0, edited.start - start)
        last = min(block_size, edited.stop - start)
        edit = (adapter_digest, first, last) if adapter_digest and first < last else ()
        # repr keeps texts apart, whatever is in them.
        around = keys[-1] + repr(edit).encode() if keys else repr((owner, edit)).encode()
        tokens = array("q", token_ids[start : start + block_size]).tobytes()
        keys.append(blake2b(tokens + around, digest_size=32).digest())
