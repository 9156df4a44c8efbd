"""Engines without a server of their own: a child process that answers one wave at a time.

The driver writes one JSON line per wave to the worker's standard input and reads one line back.
The worker times the wave itself, so the pipe costs the engine nothing.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peer import Peer, PeerError, Wave


class WorkerPeer(Peer):
    """Driver's side; `script` runs under the interpreter `options["python"]`."""

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
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()
        return Wave(**self._read())

    def _read(self) -> Any:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self.check_alive()
            raise PeerError(f"{self.name} closed its output, see {self.log}")
        return json.loads(line)


Answer = Callable[[list[list[int]], int, list[int | None]], tuple[float, list[list[int]]]]


def serve(load: Callable[[dict[str, Any]], Answer]) -> None:
    """Worker's side: loads the engine, then answers waves until its input ends."""
    # Libraries print to standard output; the protocol keeps a descriptor of its own.
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    answer = load(json.loads(sys.argv[1]))
    print("{}", file=output, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        seconds, token_ids = answer(order["prompts"], order["output_tokens"], order["adapters"])
        print(json.dumps({"seconds": seconds, "token_ids": token_ids}), file=output, flush=True)
