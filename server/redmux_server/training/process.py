"""TrainingProcess: the server's end of the process that trains a job."""

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any, NamedTuple

from redmux_server.training.check import MAX_PASS_TOKENS, TrainingSetup

_WORKER = "redmux_server.training.worker"
_SLICE_S = 0.002
_LOOK_S = 0.01


class Message(NamedTuple):
    """What the process tells: its fields, and the bytes behind them."""

    event: str
    fields: dict[str, Any]
    data: bytes


class TrainingProcess:
    """One training process, from its start to its end. Belongs to the event loop."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._has_job = False

    @classmethod
    async def start(cls) -> "TrainingProcess":
        """Starts a process that waits for its job."""
        # Threads that wait for each other are not to take the engine's time.
        environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
        # A session of its own: Ctrl-C in a terminal is for the server, which then ends this.
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", _WORKER, stdin=PIPE, stdout=PIPE, env=environment,
            start_new_session=True,
        )  # fmt: skip
        return cls(process)

    async def send_job(self, setup: TrainingSetup, payload: bytes) -> None:
        """Sends the job; it can be paused from now on."""
        header = {
            "model": setup.model, "tokenizer": setup.tokenizer,
            "device": setup.device, "dtype": setup.dtype,
            "num_threads": setup.num_threads, "max_pass_tokens": MAX_PASS_TOKENS,
            "num_bytes": len(payload),
        }  # fmt: skip
        self._has_job = True
        await self._write(json.dumps(header).encode() + b"\n" + payload)

    async def cancel(self, task: str) -> None:
        """Ends the training of one adapter after the current step; nothing before `send_job`."""
        if self._has_job:
            await self._write(json.dumps({"cancel": task}).encode() + b"\n")

    async def messages(self) -> AsyncIterator[Message]:
        """Yields what the process tells, until it closes its end."""
        assert self._process.stdout is not None
        with suppress(asyncio.IncompleteReadError):  # it ended in the middle of a message
            while line := await self._process.stdout.readline():
                if not line.endswith(b"\n"):
                    return
                fields = json.loads(line)
                data = await self._process.stdout.readexactly(fields.pop("num_bytes"))
                yield Message(fields.pop("event"), fields, data)

    async def give_way(self, is_busy: Callable[[], bool], share: float) -> None:
        """Lets the process run while nothing else does, and for `share` of the time otherwise.

        Runs until it is cancelled. Where the process runs beside requests, it does for moments, so
        that none of their steps waits for long: a slice that was too long is followed by a pause
        that is longer in proportion.
        """
        clock = asyncio.get_running_loop().time
        due_s = 0.0  # when the next slice begins, while requests run
        while True:
            is_beside = share < 1 and is_busy()
            now_s = clock()
            if is_beside and now_s < due_s:
                await asyncio.sleep(min(due_s - now_s, _LOOK_S))
                continue
            self._signal(signal.SIGCONT)
            await asyncio.sleep(_SLICE_S if is_beside else _LOOK_S)
            if is_beside:
                self._signal(signal.SIGSTOP)
                due_s = now_s + (clock() - now_s) / share

    async def end(self) -> int:
        """Kills the process unless it has ended, and returns its exit code."""
        self._signal(signal.SIGKILL)
        return await self._process.wait()

    async def _write(self, data: bytes) -> None:
        assert self._process.stdin is not None
        # Where it has ended, its messages end as well, and there it is told.
        with suppress(BrokenPipeError, ConnectionResetError):
            self._process.stdin.write(data)
            await self._process.stdin.drain()

    def _signal(self, number: int) -> None:
        # Not the process object's own method: it may reap the process and lose its exit code.
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self._process.pid, number)
