"""The redmux command on a terminal of its own."""

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time

_LIMIT_S = 60
# Takes the terminal for its own, so that Ctrl-C becomes SIGINT, which it heeds.
_START = """
import fcntl, runpy, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("redmux", run_name="__main__")
"""


class Terminal:
    """Runs a command on a pseudo-terminal that the test types on and reads."""

    def __init__(self, *arguments, columns=80, lines=24):
        self._master, child = pty.openpty()
        fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        kept = {name: text for name, text in os.environ.items() if name not in ("COLUMNS", "LINES")}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, *arguments], stdin=child, stdout=child, stderr=child,
            start_new_session=True, env=kept | {"TERM": "xterm"},
        )  # fmt: skip
        os.close(child)
        self._text = ""

    def until(self, text):
        """Reads until `text` comes; returns what came before it."""
        end_s = time.monotonic() + _LIMIT_S
        while text not in self._text:
            ready, _, _ = select.select([self._master], [], [], max(0, end_s - time.monotonic()))
            assert ready, f"no {text!r} in {self._text!r}"
            assert self._read(), f"it ended without {text!r}: {self._text!r}"
        before, _, self._text = self._text.partition(text)
        return before

    def type(self, text):
        os.write(self._master, text.encode())

    def interrupt_until(self, text):
        """Presses Ctrl-C until `text` comes.

        Where it meets readline at work on a key, Python heeds it with the next key alone.
        """
        end_s = time.monotonic() + _LIMIT_S
        while text not in self._text:
            assert time.monotonic() < end_s, f"no {text!r} in {self._text!r}"
            self.type("\x03")
            while select.select([self._master], [], [], 1)[0] and text not in self._text:
                assert self._read(), f"it ended without {text!r}: {self._text!r}"
        self._text = self._text.partition(text)[2]

    def ended(self):
        """Returns the exit code, and what was left to read."""
        while self._read():
            pass
        return self._process.wait(_LIMIT_S), self._text

    def _read(self):
        try:
            part = os.read(self._master, 65536)
        except OSError:  # nobody is on its other side any more
            part = b""
        self._text += part.decode()
        return bool(part)

    def close(self):
        self._process.kill()
        self._process.wait()
        os.close(self._master)
