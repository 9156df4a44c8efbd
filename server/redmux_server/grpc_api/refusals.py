"""Refusals: the trace of calls that are turned away at the door."""

import logging
import time
from collections.abc import Callable

from redmux.errors import RedmuxError, UnauthenticatedError

logger = logging.getLogger(__name__)

_EVERY_S = 60.0


class Refusals:
    """Counts what is refused before its method is called, and tells of callers without a key.

    However many of these come, a line of the log speaks of all since the one before it, a minute
    ago at least. It has the address of one of them, never what they gave as a key.
    """

    def __init__(
        self,
        count: Callable[[str], None] = lambda code: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`count` is called with the status code of each; `clock` tells seconds."""
        self._count = count
        self._clock = clock
        self._num_untold = 0
        self._told_s: float | None = None

    def add(self, err: RedmuxError, method: str, peer: str) -> None:
        """Takes note of a call of `method` that ends with this error."""
        self._count(err.status.name.lower())
        if not isinstance(err, UnauthenticatedError):
            return
        self._num_untold += 1
        now_s = self._clock()
        if self._told_s is not None and now_s - self._told_s < _EVERY_S:
            return
        logger.warning(
            "calls refused for a missing or unknown API key: %d since the last such line; this one "
            "is from %s to %s", self._num_untold, peer, method,
        )  # fmt: skip
        self._num_untold, self._told_s = 0, now_s
