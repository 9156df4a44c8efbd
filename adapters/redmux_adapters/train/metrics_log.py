"""MetricsLog: the course of a run as CSV, and for TensorBoard where that is wanted."""

import csv
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from redmux.errors import InvalidArgumentError

from .events import Evaluated, Event, Stepped

METRICS_NAME = "metrics.csv"
_COLUMNS = (
    "task", "step", "split", "loss", "accuracy", "correlation", "learning_rate", "grad_norm",
    "num_tokens", "tokens_per_s", "elapsed_s",
)  # fmt: skip


class MetricsLog:
    """Appends a line per optimizer step ("train") and per evaluation ("valid") to metrics.csv.

    `steps` are those that each task had taken before: lines behind them, which a run wrote that
    was killed later, are dropped, so that no step is told twice.
    """

    def __init__(self, folder: Path, steps: Mapping[str, int], tensorboard: bool = False) -> None:
        self._board = _board(folder / "tensorboard") if tensorboard else None
        path = folder / METRICS_NAME
        kept = _lines_up_to(path, steps) if any(steps.values()) and path.exists() else []
        self._file = path.open("w", encoding="utf-8", newline="")
        self._writer = csv.writer(self._file)
        self._writer.writerows([_COLUMNS, *kept])

    def write(self, events: Sequence[Event], tokens_per_s: float, elapsed_s: float) -> None:
        """Writes what a trainer's step returned; the rate is that of all tasks together."""
        times = f"{tokens_per_s:.1f}", f"{elapsed_s:.2f}"
        for event in events:
            if isinstance(event, Stepped):
                values = {"loss": event.loss, "lr": event.learning_rate, "norm": event.grad_norm}
                cells: tuple[object, ...] = (
                    "train", f"{event.loss:.6g}", "", "", f"{event.learning_rate:.6g}",
                    f"{event.grad_norm:.6g}", event.num_tokens, *times,
                )  # fmt: skip
            elif isinstance(event, Evaluated):
                found = {"accuracy": event.accuracy, "correlation": event.correlation}
                shown = ("" if value is None else f"{value:.6g}" for value in found.values())
                cells = ("valid", f"{event.loss:.6g}", *shown, "", "", "", *times)
                values = {"loss": event.loss}
                values |= {name: value for name, value in found.items() if value is not None}
            else:
                continue
            self._writer.writerow((event.task, event.step, *cells))
            if self._board is not None:
                for name, value in values.items():
                    self._board.add_scalar(f"{event.task}/{cells[0]}/{name}", value, event.step)
        self._file.flush()

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def _lines_up_to(path: Path, steps: Mapping[str, int]) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.reader(file) if len(row) == len(_COLUMNS)]
    return [row for row in rows[1:] if row[1].isdigit() and int(row[1]) <= steps.get(row[0], 0)]


def _board(folder: Path) -> Any:
    if importlib.util.find_spec("tensorboard") is None:
        raise InvalidArgumentError("TensorBoard is not installed; pip install tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder))
