"""Leaving: signals, and the end of the process within its limit, whatever hangs."""

import faulthandler
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)

EXIT_SOFTWARE = 70  # sysexits.h: an internal error; a supervisor should start us again

_ENDING = (signal.SIGTERM, signal.SIGINT)
_GRACE_S = 10.0  # beside the draining: for the step under way, the port, what is to be written
_AT_ONCE_S = 3.0
_EXIT_S = 2.0  # for the interpreter itself, once everything has stopped


def stop_loading(*_: object) -> None:
    """Ends the process at once; for as long as nobody is served yet."""
    logger.info("stopped while loading")
    os._exit(0)  # a thread that loads cannot be interrupted


def heed_signals() -> None:
    """Lets SIGTERM and SIGINT end the process at once, until there is a `Leaving`.

    The first process of a container is ended by no signal that it does not handle.
    """
    for number in _ENDING:
        signal.signal(number, stop_loading)


class Leaving:
    """Hears of SIGTERM and SIGINT in a thread of its own, which ends the process if need be.

    The first signal gives the process `drain_s` and ten seconds, the second one three seconds. What
    hangs delays that as little as a thread that the interpreter would wait for; only who holds the
    interpreter's lock for ever does.
    """

    def __init__(
        self, drain_s: float, on_signal: Callable[[], None],
        on_hangup: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        """`on_signal` is called in that thread, and for SIGHUP `on_hangup`, if that is handled.

        Has to be made in the main thread.
        """
        self._on_hangup = on_hangup
        self._limits_s = [drain_s + _GRACE_S, _AT_ONCE_S]
        self._on_signal = on_signal
        self._until_s: float | None = None
        self._code: int | None = None  # to end with, once everything has stopped
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        for number in _ENDING if on_hangup is None else (*_ENDING, signal.SIGHUP):
            signal.signal(number, lambda *_: None)  # what counts is the byte that it leaves
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="leaving", daemon=True).start()

    def begin(self) -> None:
        """Gives the process the time that a first signal gives it, without one."""
        self._limit(self._limits_s.pop(0) if self._limits_s else 0)

    def stopped(self, code: int) -> None:
        """Says that nothing is left to do but to end with this code."""
        self._code = code
        self._limit(_EXIT_S)

    def _limit(self, limit_s: float) -> None:
        self._until_s = time.monotonic() + limit_s
        self._writer.send(b"\0")

    def _watch(self) -> None:
        while True:
            left_s = None if self._until_s is None else self._until_s - time.monotonic()
            if left_s is not None and left_s <= 0:
                self._leave()
            self._reader.settimeout(left_s)
            try:
                (number,) = self._reader.recv(1)
            except TimeoutError:
                continue
            if number == signal.SIGHUP and self._on_hangup is not None:
                self._on_hangup()
            if number in _ENDING and self._limits_s:
                self._until_s = time.monotonic() + self._limits_s.pop(0)
                self._on_signal()

    def _leave(self) -> None:
        if self._code is None:
            logger.critical("the process did not end within its limit; this is what hangs:")
            faulthandler.dump_traceback()
        os._exit(EXIT_SOFTWARE if self._code is None else self._code)
