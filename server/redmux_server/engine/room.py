"""Room: how many blocks of the cache requests are expected to need."""

from collections.abc import Iterable, Sequence

from redmux_server.engine.blocks import BlockPool
from redmux_server.engine.request import Request

_LEAST_BLOCKS = 2  # that a request is expected to grow by, unless it may not


class Room:
    """Tells whether a request can be admitted beside the growth that others are expected to have.

    Nobody knows how long an answer gets. One that has come so far is expected to get as long again,
    so what is left free follows the answers themselves: little for short ones, and never more than
    they may have, so as many requests run as if each held its whole length, or more.
    """

    def __init__(self, blocks: BlockPool) -> None:
        self._blocks = blocks

    def expected(self, request: Request) -> int:
        """Returns how many blocks a request is expected to hold, those that it has included."""
        growth = max(request.num_output, _LEAST_BLOCKS * self._blocks.block_size)
        return self._blocks.blocks_for(min(request.max_length, request.num_placed + growth))

    def promised(self, request: Request) -> int:
        """Returns how many of the blocks that are expected a running request does not hold yet."""
        return self.expected(request) - len(request.blocks)

    def num_missing(
        self, request: Request, found: Sequence[int], running: Iterable[Request]
    ) -> int:
        """Returns how many blocks would have to be free beside those that are, to admit it.

        `found` are those of its beginning that the cache has.
        """
        needed = self.expected(request) + sum(map(self.promised, running))
        return self._blocks.num_missing(needed, found)

    def gained(self, running: Request) -> int:
        """Returns how many blocks fewer are missing for others once a running request is gone."""
        return self._blocks.num_sole(running.blocks) + self.promised(running)
