"""What the driver needs of an engine, and the engine's processes: start, pause, measure, stop.

Standard library only, because the workers run it under the peers' own interpreters, too.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

READY_TIMEOUT_S = 900.0
STOP_TIMEOUT_S = 20.0


class PeerError(Exception):
    """An engine did not start, refused a request or answered with something else."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What every engine is sized for."""

    concurrency: int
    context: int
    adapters: int


@dataclass(frozen=True, slots=True)
class Wave:
    """The answers to requests that were sent at once, and the time until the last one."""

    seconds: float
    token_ids: list[list[int]]


@dataclass
class Peer:
    """One engine in processes of its own.

    `options` is its table in the TOML file, `models` the folder that prepare.py wrote. A subclass
    gives `command` and implements `wait_ready` and `wave`.
    """

    name: str
    options: Mapping[str, Any]
    models: Path
    limits: Limits
    log_folder: Path
    command: list[str] = field(default_factory=list, init=False)
    environment: dict[str, str] = field(default_factory=dict, init=False)
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        """Sets `command` and, where needed, `environment`."""
        raise NotImplementedError

    @property
    def workloads(self) -> tuple[str, ...]:
        """Which of "base" and "adapters" this engine is measured with."""
        return tuple(self.options["workloads"])

    @property
    def log(self) -> Path:
        """The file with everything the engine prints."""
        return self.log_folder / f"{self.name}.log"

    def start(self) -> None:
        """Returns once the engine answers and its adapters are loaded."""
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self.command,
                env=os.environ | self.environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if self.speaks_on_stdout else log,
                stderr=log,
                start_new_session=True,
            )
        self.wait_ready()

    speaks_on_stdout = False

    def wait_ready(self) -> None:
        """Returns once requests can be sent; raises PeerError when the process is gone."""
        raise NotImplementedError

    def wave(
        self, prompts: Sequence[Sequence[int]], output_tokens: int, adapters: Sequence[int | None]
    ) -> Wave:
        """Sends all requests at once; adapters[i] is the index of request i's adapter or None."""
        raise NotImplementedError

    def versions(self) -> dict[str, str]:
        """Returns the versions of what computes."""
        names = self.options.get("packages", [])
        if not names:
            return {}
        code = "import sys, importlib.metadata as m; print(*map(m.version, sys.argv[1:]))"
        python = self.options.get("python", sys.executable)
        output = subprocess.check_output([python, "-c", code, *names], text=True)
        return dict(zip(names, output.split(), strict=True))

    def check_alive(self) -> None:
        """Raises PeerError, with the end of the log, if the process has ended."""
        assert self._process is not None
        if self._process.poll() is not None:
            tail = self.log.read_text(errors="replace")[-1500:]
            raise PeerError(f"{self.name} ended with {self._process.returncode}:\n{tail}")

    def pids(self) -> list[int]:
        """Returns the engine's process and all its descendants."""
        return process_tree(self._process.pid) if self._process else []

    def pause(self) -> None:
        """Stops all its processes, so that no thread of an idle engine spins on a core."""
        for pid in self.pids():
            os.kill(pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Undoes `pause`."""
        for pid in self.pids():
            os.kill(pid, signal.SIGCONT)

    def stop(self) -> None:
        """Ends all its processes."""
        if self._process is None:
            return
        pids = self.pids()
        for number in (signal.SIGCONT, signal.SIGTERM):
            signal_all(pids, number)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_TIMEOUT_S)
        signal_all(pids, signal.SIGKILL)
        self._process.wait()
        self._process = None

    def memory_mb(self) -> int:
        """Returns the resident memory of all its processes in MB.

        Libraries that several processes of one engine share count once for each of them.
        """
        return round(sum(rss_bytes(pid) for pid in self.pids()) / 1e6)

    def cpu_seconds(self) -> float:
        """Returns the processor time that its living processes have used."""
        return sum(map(cpu_seconds, self.pids()))


class HttpPeer(Peer):
    """An engine behind an HTTP server of its own on loopback."""

    path = ""

    def __post_init__(self) -> None:
        self.port = free_port()

    def body(self, prompt: Sequence[int], output_tokens: int, adapter: int | None) -> Any:
        """Returns the JSON of one request."""
        raise NotImplementedError

    def token_ids(self, answer: Any) -> list[int]:
        """Returns the generated tokens of one answer."""
        raise NotImplementedError

    def wait_ready(self) -> None:  # noqa: D102
        end = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < end:
            self.check_alive()
            try:
                connection = HTTPConnection("127.0.0.1", self.port, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            except (OSError, HTTPException):
                pass
            time.sleep(0.3)
        raise PeerError(f"{self.name} was not ready within {READY_TIMEOUT_S:g} s, see {self.log}")

    def wave(  # noqa: D102
        self, prompts: Sequence[Sequence[int]], output_tokens: int, adapters: Sequence[int | None]
    ) -> Wave:
        bodies = [
            json.dumps(self.body(prompt, output_tokens, adapter))
            for prompt, adapter in zip(prompts, adapters, strict=True)
        ]
        with ThreadPoolExecutor(len(bodies)) as pool:
            started = time.perf_counter()
            answers = list(pool.map(self._post, bodies))
            seconds = time.perf_counter() - started
        return Wave(seconds, [self.token_ids(json.loads(answer)) for answer in answers])

    def _post(self, body: str) -> bytes:
        # A connection per request: servers drop idle ones, and these were paused in between.
        connection = HTTPConnection("127.0.0.1", self.port, timeout=READY_TIMEOUT_S)
        connection.request("POST", self.path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = response.read()
        if response.status != 200:
            raise PeerError(f"{self.name} answered {response.status}: {answer[:500]!r}")
        return answer


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def process_tree(pid: int) -> list[int]:
    pids = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = task.read_text().split()
        except OSError:  # the thread ended meanwhile
            continue
        for child in children:
            pids += process_tree(int(child))
    return pids


def signal_all(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def rss_bytes(pid: int) -> int:
    try:
        pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def cpu_seconds(pid: int, *, with_ended_children: bool = False) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    ticks = sum(map(int, fields[11 : 15 if with_ended_children else 13]))
    return ticks / os.sysconf("SC_CLK_TCK")


def all_cpu_seconds(pids: Iterable[int]) -> float:
    """Returns what these processes and their ended children have used.

    Summed over every process this is the machine's, and unlike the counters of /proc/stat it is
    no sample per clock tick, which misses threads that sleep and wake often.
    """
    return sum(cpu_seconds(pid, with_ended_children=True) for pid in pids)


def every_pid() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
