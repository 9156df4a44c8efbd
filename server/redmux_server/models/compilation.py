"""Tells that kernels are compiled, which only the first start on a machine waits for."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from numba.core import event

logger = logging.getLogger(__name__)

_EVERY_S = 10.0


class CompilationTeller(event.Listener):  # type: ignore[misc]
    """Counts what numba compiles instead of finding it in its cache."""

    def __init__(self) -> None:
        self.num_compiled = 0
        self._told_s = 0.0

    def on_start(self, event: event.Event) -> None:
        """See numba's Listener."""
        now_s = time.monotonic()
        if not self.num_compiled:
            logger.info("compiling kernels for this CPU, which later starts find in the cache")
        elif now_s - self._told_s > _EVERY_S:
            logger.info("still compiling kernels, %d so far", self.num_compiled)
        else:
            now_s = self._told_s
        self._told_s = now_s
        self.num_compiled += 1

    def on_end(self, event: event.Event) -> None:
        """See numba's Listener."""


@contextmanager
def compilation_told() -> Iterator[CompilationTeller]:
    """Logs when numba compiles within the block, once in a while, and what it came to."""
    teller = CompilationTeller()
    started_s = time.monotonic()
    with event.install_listener("numba:compile", teller):
        yield teller
    if teller.num_compiled:
        took_s = time.monotonic() - started_s
        logger.info("compiled %d kernels while loading for %.0f s", teller.num_compiled, took_s)
