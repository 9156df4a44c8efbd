"""What the driver needs of an engine, and the engine's processes: start, pause, measure, stop."""

import json
import os
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

import psutil

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
    _process: psutil.Popen | None = field(default=None, init=False)

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
            self._process = psutil.Popen(
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

    def processes(self) -> list[psutil.Process]:
        """Returns the engine's process and all its descendants; none once it has ended."""
        if self._process is None or self._process.poll() is not None:
            return []
        return [self._process, *self._process.children(recursive=True)]

    def pause(self) -> None:
        """Stops all its processes, so that no thread of an idle engine spins on a core."""
        for process in self.processes():
            process.suspend()

    def resume(self) -> None:
        """Undoes `pause`."""
        for process in self.processes():
            process.resume()

    def stop(self) -> None:
        """Ends all its processes."""
        processes = self.processes()
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.resume()
                process.terminate()
        _, alive = psutil.wait_procs(processes, STOP_TIMEOUT_S)
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._process = None

    def memory_mb(self) -> int:
        """Returns the resident memory of all its processes in MB.

        Libraries that several processes of one engine share count once for each of them.
        """
        return round(sum(process.memory_info().rss for process in self.processes()) / 1e6)


def cpu_seconds(processes: Iterable[psutil.Process], *, with_ended_children: bool) -> float:
    """Returns the processor time that these processes have used.

    With their ended children, and summed over every process, this is the machine's. Unlike the
    counters of /proc/stat it is no sample per clock tick, which misses threads that sleep and wake
    often.
    """
    seconds = 0.0
    for process in processes:
        with suppress(psutil.Error):
            times = process.cpu_times()
            seconds += times.user + times.system
            if with_ended_children:
                seconds += times.children_user + times.children_system
    return seconds


class ServerPeer(Peer):
    """An engine behind a server of its own on a port of loopback."""

    def __post_init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])

    def is_ready(self) -> bool:
        """Tells whether the server answers."""
        raise NotImplementedError

    def wait_ready(self) -> None:  # noqa: D102
        end = time.monotonic() + READY_TIMEOUT_S
        while not self.is_ready():
            self.check_alive()
            if time.monotonic() > end:
                raise PeerError(f"{self.name} was not ready in time, see {self.log}")
            time.sleep(0.3)


class HttpPeer(ServerPeer):
    """An engine that takes its requests as JSON at `path`."""

    path = ""

    def body(self, prompt: Sequence[int], output_tokens: int, adapter: int | None) -> Any:
        """Returns the JSON of one request."""
        raise NotImplementedError

    def token_ids(self, answer: Any) -> list[int]:
        """Returns the generated tokens of one answer."""
        raise NotImplementedError

    def is_ready(self) -> bool:  # noqa: D102
        try:
            return self._send("GET", "/health", timeout_s=5)[0] == 200
        except (OSError, HTTPException):
            return False

    def wave(  # noqa: D102
        self, prompts: Sequence[Sequence[int]], output_tokens: int, adapters: Sequence[int | None]
    ) -> Wave:
        bodies = [
            json.dumps(self.body(prompt, output_tokens, adapter))
            for prompt, adapter in zip(prompts, adapters, strict=True)
        ]
        with ThreadPoolExecutor(len(bodies)) as pool:
            started = time.perf_counter()
            answers = list(pool.map(lambda body: self._send("POST", self.path, body), bodies))
            seconds = time.perf_counter() - started
        for status, answer in answers:
            if status != 200:
                raise PeerError(f"{self.name} answered {status}: {answer[:500]!r}")
        return Wave(seconds, [self.token_ids(json.loads(answer)) for _, answer in answers])

    def _send(
        self, method: str, path: str, body: str | None = None, timeout_s: float = READY_TIMEOUT_S
    ) -> tuple[int, bytes]:
        # A connection per request: servers drop idle ones, and these were paused in between.
        connection = HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        connection.request(method, path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()


class WorkerPeer(Peer):
    """An engine without a server: a child process that answers one wave at a time.

    `script` runs `worker.serve` under the interpreter `options["python"]`: one JSON line for each
    wave on its standard input, one back. It times the wave itself, so the pipe costs the engine
    nothing.
    """

    script = ""
    speaks_on_stdout = True

    def settings(self) -> dict[str, Any]:
        """Returns what the worker is told at its start."""
        raise NotImplementedError

    def __post_init__(self) -> None:
        script = Path(__file__).with_name(self.script)
        self.command = [self.options["python"], str(script), json.dumps(self.settings())]

    def wait_ready(self) -> None:  # noqa: D102
        self._read()

    def wave(  # noqa: D102
        self, prompts: Sequence[Sequence[int]], output_tokens: int, adapters: Sequence[int | None]
    ) -> Wave:
        order = {"prompts": prompts, "output_tokens": output_tokens, "adapters": adapters}
        assert self._process is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()
        return Wave(**self._read())

    def _read(self) -> Any:
        assert self._process is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self.check_alive()
        return json.loads(line)
