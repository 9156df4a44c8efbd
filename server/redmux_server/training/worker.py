"""The training process: reads one job from stdin, trains it, tells on stdout how it goes.

Both ways, a message is a line of JSON, followed by as many raw bytes as its "num_bytes" says.
"""

import ctypes
import json
import logging
import os
import queue
import signal
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from redmux.errors import RedmuxError

_SET_PARENT_DEATH_SIGNAL = 1  # of prctl
_MOST_SHOWN_CHARS = 1500


def main() -> int:
    """Trains the job of stdin; returns 0 if it came to its end, 1 after telling why not."""
    # Training must not outlive the server, which cannot end what it has stopped if it is killed.
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    _give_way()
    # Libraries may print; what they print goes to the log.
    out = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    logging.basicConfig(level="WARNING", format="training: %(levelname)s %(name)s: %(message)s")
    teller = _Teller(out)
    teller.tell("ready")
    try:
        _train(sys.stdin.buffer, teller)
    except RedmuxError as err:
        teller.tell("failed", message=err.message[:_MOST_SHOWN_CHARS])
        return 1
    return 0


def _give_way() -> None:
    """Makes the server more important than this process, for time and for memory."""
    # Not the lowest priority, with which training would starve beside any other busy process.
    with suppress(OSError):
        os.nice(10)
    with suppress(OSError):  # what the system kills first where memory runs out
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")


class _Teller:
    def __init__(self, out: IO[bytes]) -> None:
        self._out = out

    def tell(self, event: str, data: bytes = b"", **fields: Any) -> None:
        line = json.dumps({"event": event, "num_bytes": len(data), **fields})
        self._out.write(line.encode() + b"\n" + data)
        self._out.flush()


def _train(commands: IO[bytes], teller: _Teller) -> None:
    import torch

    from redmux_adapters import to_bytes
    from redmux_adapters.train import Evaluated, Stepped, Trainer, load_training_base
    from redmux_adapters.train.inline import InlineTask, make_inline_tasks
    from redmux_adapters.train.preparation import training_kind

    setup = json.loads(commands.readline())
    inline = [InlineTask(**item) for item in json.loads(commands.read(setup["num_bytes"]))]
    torch.set_num_threads(setup["num_threads"])
    base = load_training_base(
        setup["model"], training_kind(setup["model"]), getattr(torch, setup["dtype"]),
        setup["tokenizer"],
    )  # fmt: skip
    base.model.to(setup["device"])
    trainer = Trainer(
        base, make_inline_tasks(base, inline), max_pass_tokens=setup["max_pass_tokens"]
    )
    cancelled: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read_cancels, args=(commands, cancelled), daemon=True).start()
    while trainer.active:
        for event in trainer.step():
            if isinstance(event, Stepped):
                teller.tell("stepped", **asdict(event))
            elif isinstance(event, Evaluated):
                teller.tell("evaluated", **asdict(event))
            elif event.ending == "diverged":
                teller.tell("diverged", task=event.task, detail=event.detail)
            else:
                data = to_bytes(trainer.adapter(event.task))
                teller.tell("adapter", data, task=event.task, ending=event.ending)
        _cancel(trainer, cancelled)


def _read_cancels(commands: IO[bytes], cancelled: "queue.SimpleQueue[str]") -> None:
    for line in commands:
        message: Mapping[str, str] = json.loads(line)
        cancelled.put(message["cancel"])


def _cancel(trainer: Any, cancelled: "queue.SimpleQueue[str]") -> None:
    with suppress(queue.Empty):
        while True:
            name = cancelled.get_nowait()
            if any(learner.task.name == name for learner in trainer.active):
                trainer.cancel(name)


if __name__ == "__main__":
    sys.exit(main())
