"""The server that is measured: one that runs already, or a process that is started for it."""

import argparse
import re
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import psutil

from redmux import AsyncClient, UnavailableError
from redmux_adapters.bases.load import DEFAULT_MODEL

_SERVING = re.compile(r"serving .* on (\S+:\d+), HTTP on port (-?\d+), ")
_KEPT_LINES = 20


class ServerProcess:
    """`redmux serve` on free ports of the loopback address, ended when the block is left.

    `address` is that of gRPC, `http_port` the other door's on the same host. `startup_s` is the
    time from its start until it serves.
    """

    def __init__(self, *flags: str, environ: Mapping[str, str] | None = None) -> None:
        self._environ = environ  # None for this process's own
        self._command = [
            sys.executable, "-m", "redmux", "serve",
            "--port", "0", "--http-port", "0", "--metrics-port", "0", "--log-level", "info", *flags,
        ]  # fmt: skip
        self.address = ""
        self.http_port = -1
        self.startup_s = 0.0
        self._log: deque[str] = deque(maxlen=_KEPT_LINES)
        self._is_known = threading.Event()  # whether it serves or has ended

    def __enter__(self) -> Self:
        """Returns when the server serves; raises UnavailableError if it ends before."""
        self._started_s = time.perf_counter()
        self._process = subprocess.Popen(
            self._command, stderr=subprocess.PIPE, text=True, env=self._environ
        )
        self._reader = threading.Thread(target=self._read, name="server log", daemon=True)
        self._reader.start()
        try:
            self._is_known.wait()
            if not self.address:
                raise UnavailableError(f"the server did not start: {self._last_words()}")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._end()

    def client(self) -> AsyncClient:
        """Returns a new client of the server."""
        return AsyncClient(self.address)

    @property
    def resident_bytes(self) -> int:
        """Memory that the process holds now."""
        resident: int = psutil.Process(self._process.pid).memory_info().rss
        return resident

    @property
    def cpu_s(self) -> float:
        """Processor time that the process has used so far, with its processes that have ended."""
        times = psutil.Process(self._process.pid).cpu_times()
        return float(times.user + times.system + times.children_user + times.children_system)

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._log.append(line)
            found = _SERVING.search(line)
            if found and not self.address:
                self.startup_s = time.perf_counter() - self._started_s
                self.address, self.http_port = found[1], int(found[2])
                self._is_known.set()
        self._is_known.set()

    def _last_words(self) -> str:
        """Returns the message that the server ended with, which may have several lines."""
        text = "".join(self._log).strip()
        message = text.rpartition("redmux serve: ")[2]
        return message if message != text else text.rpartition("\n")[2] or "it said nothing"

    def _end(self) -> None:
        # The second signal cuts the draining short: nobody waits for what still runs.
        while self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                continue
        self._reader.join()
        assert self._process.stderr is not None
        self._process.stderr.close()


@dataclass(frozen=True, slots=True)
class Target:
    """Where the load goes."""

    address: str
    api_key: str | None = None
    tls: bool = False

    def client(self) -> AsyncClient:
        """Returns a new client of the server."""
        return AsyncClient(self.address, api_key=self.api_key, tls=self.tls)


@contextmanager
def reach(options: argparse.Namespace, max_running: int) -> Iterator[Target]:
    """Yields the server of --target, or one that is started for the block.

    `max_running` is what a started one has to hold in a forward pass; --serve-arg wins over it.
    """
    if options.target is not None:
        yield Target(options.target, options.api_key, options.tls)
        return
    with start(options, max_running) as process:
        yield Target(process.address)


def start(options: argparse.Namespace, max_running: int, *flags: str) -> ServerProcess:
    """Returns a server of --model, to be entered, that takes `max_running` requests at once."""
    return ServerProcess(*serve_flags(options, max_running), *flags)


def serve_flags(options: argparse.Namespace, max_running: int) -> list[str]:
    """Returns the arguments of `redmux serve` for this; those of --serve-arg win."""
    running = max(64, max_running)
    return [
        "--model", options.model or DEFAULT_MODEL, "--max-running", str(running),
        "--max-batch-tokens", str(max(256, running)), *options.serve_arg,
    ]  # fmt: skip
