"""Progress of a known or unknown number of items on stderr: tqdm's bar, else a plain line."""

import importlib
import sys
import time
from types import TracebackType
from typing import Any, Protocol, Self

_EVERY_S = 0.5  # between two states of the line


class _Bar(Protocol):
    """The part of tqdm's interface that is used."""

    def update(self) -> object: ...

    def close(self) -> object: ...


class Progress:
    """Counts items on stderr while it is entered; nothing where it is not wanted."""

    def __init__(self, *, is_wanted: bool, total: int | None) -> None:
        self._is_wanted = is_wanted
        self._total = total
        self._bar: _Bar | None = None

    def advance(self) -> None:
        """Counts one more."""
        if self._bar is not None:
            self._bar.update()

    def __enter__(self) -> Self:
        if self._is_wanted:
            self._bar = _bar(self._total)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()


def total_of(items: object) -> int | None:
    """Returns how many items there are, None where only the end will tell."""
    try:
        return len(items)  # type: ignore[arg-type]
    except TypeError:
        return None


def _bar(total: int | None) -> _Bar:
    try:
        tqdm: Any = importlib.import_module("tqdm").tqdm
    except ModuleNotFoundError:
        return _Line(total)
    bar: _Bar = tqdm(total=total)
    return bar


class _Line:
    """One line, written over on a terminal and otherwise once, at the end."""

    def __init__(self, total: int | None) -> None:
        self._total = total
        self._num = 0
        self._began_s = time.monotonic()
        self._told_s = self._began_s
        self._is_terminal = sys.stderr.isatty()

    def update(self) -> None:
        self._num += 1
        now_s = time.monotonic()
        if self._is_terminal and now_s - self._told_s >= _EVERY_S:
            self._told_s = now_s
            print(f"\r{self._text(now_s)}\x1b[K", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        begin, end = ("\r", "\x1b[K\n") if self._is_terminal else ("", "\n")
        print(begin + self._text(time.monotonic()), end=end, file=sys.stderr, flush=True)

    def _text(self, now_s: float) -> str:
        total = "" if self._total is None else f" of {self._total}"
        rate = self._num / max(now_s - self._began_s, 1e-9)
        return f"{self._num}{total} done, {rate:.1f} per second"
