"""`redmux top`: what a server does, live."""

import argparse
import math
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from redmux._connecting import connect
from redmux._load_figures import Figures, Quantiles, figures
from redmux._printing import json_line
from redmux._shell import shell_line
from redmux.client import Client
from redmux.errors import InvalidArgumentError, UnavailableError

_LABEL = 14
_LEAST_BAR, _MOST_BAR = 8, 40
_ENTER = "\x1b[?1049h\x1b[?25l"  # another screen, without a cursor
_REDRAW = "\x1b[H\x1b[J"
_LEAVE = "\x1b[?25h\x1b[?1049l"


def add_top(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    server: argparse.ArgumentParser,
) -> None:
    """Adds the command; `server` has the options of the connection and --json."""
    parser = commands.add_parser(
        "top", parents=[server], help="show live what the server does: queue, batch, tokens/s"
    )
    parser.set_defaults(run=_top)
    parser.add_argument(
        "--interval", type=float, default=2.0, metavar="SECONDS",
        help="time between two looks, over which rates and latencies are; default: 2",
    )  # fmt: skip
    parser.add_argument("--once", action="store_true", help="show one interval and end")


def _top(options: argparse.Namespace) -> int:
    if not 0.1 <= options.interval <= 3600:
        raise InvalidArgumentError(f"--interval is {options.interval:g}, must be 0.1 to 3600")
    is_live = sys.stdout.isatty() and not options.once and not options.json
    with connect(options) as client, _other_screen(is_wanted=is_live):
        try:
            for look in _looks(client, options.interval):
                if options.once and isinstance(look, UnavailableError):
                    raise look
                _print(look, is_live=is_live, as_json=options.json)
                if options.once:
                    break
        except KeyboardInterrupt:
            if not is_live:
                raise
    return 0


def _looks(client: Client, interval_s: float) -> Iterator[Figures | UnavailableError]:
    """Yields the figures of every interval, or why the server could not be asked."""
    before = client.info()
    while True:
        time.sleep(interval_s)
        try:
            now = client.info()
        except UnavailableError as error:
            yield error
        else:
            yield figures(before, now)
            before = now


@contextmanager
def _other_screen(*, is_wanted: bool) -> Iterator[None]:
    """Leaves what is on the terminal as it is, for when it is over."""
    if not is_wanted:
        yield
        return
    print(_ENTER, end="", flush=True)
    try:
        yield
    finally:
        print(_LEAVE, end="", flush=True)


def _print(look: Figures | UnavailableError, *, is_live: bool, as_json: bool) -> None:
    if isinstance(look, UnavailableError):
        text = shell_line(look.message)
        if is_live:
            print(f"{_REDRAW}{text}", flush=True)
        else:
            print(f"redmux: {text}", file=sys.stderr, flush=True)
    elif as_json:
        print(json_line(look), flush=True)
    elif is_live:
        size = shutil.get_terminal_size()
        lines = frame(look, size.columns)[: size.lines - 1]
        print(_REDRAW + "\n".join(lines), flush=True)
    else:
        print(*frame(look, shutil.get_terminal_size().columns), sep="\n", flush=True)


def frame(look: Figures, columns: int) -> list[str]:
    """Returns lines that tell the figures, none longer than the terminal is wide."""
    device = f"{look.device} ({look.dtype})"
    cache = f"{100 * look.kv_cache_used:.0f} %"
    running = f"{look.num_running} of {look.max_running}"
    waiting = f"{look.num_waiting} of {look.max_queue}"
    lines = [
        f"redmux {look.version}  {look.model}  {device}  up {_duration(look.uptime_s)}",
        "",
        _bar("running", running, look.num_running / look.max_running, columns),
        _bar("waiting", waiting, look.num_waiting / max(1, look.max_queue), columns),
        _bar("cache", cache, look.kv_cache_used, columns),
        _line("adapters", f"{look.num_running_adapters} running, {look.num_adapters} published"),
        "",
        _line(
            "tokens/s",
            f"{look.completion_tokens_per_s:.1f} generated, {look.prompt_tokens_per_s:.1f} of "
            f"prompts, {look.cached_tokens_per_s:.1f} cached",
        ),
        _line("requests/s", f"{look.requests_per_s:.1f} ended, {look.refused_per_s:.1f} refused"),
        _line("first token", _spread(look.first_token)),
        _line("next tokens", _spread(look.between_tokens)),
        _line("whole request", _spread(look.whole_request)),
    ]
    return [line[:columns] for line in lines]


def _line(label: str, text: str) -> str:
    return f"{label:<{_LABEL}}{text}"


def _bar(label: str, text: str, share: float, columns: int) -> str:
    """Returns a line with a bar, where there is room for one."""
    line = _line(label, f"{text:<14}")
    width = min(_MOST_BAR, columns - len(line) - len("[]"))
    if width < _LEAST_BAR:
        return line.rstrip()
    filled = min(width, math.ceil(share * width))
    return f"{line}[{'#' * filled}{'-' * (width - filled)}]"


def _spread(found: Quantiles) -> str:
    if found.p50_s is None or found.p95_s is None:
        return "-"
    return f"{_seconds(found.p50_s)} median, {_seconds(found.p95_s)} for 95 of 100"


def _seconds(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _duration(seconds: float) -> str:
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if minutes < 1:
        return f"{seconds:.0f} s"
    if hours < 1:
        return f"{minutes} min"
    return f"{hours} h {minutes % 60} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"
