"""How long a server takes to be ready with a folder of many adapters, against an empty one."""

import argparse
import asyncio
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from redmux_bench import report
from redmux_bench.adapters import RandomAdapters
from redmux_bench.server_process import ServerProcess, start


@dataclass(frozen=True, slots=True)
class Startup:
    """Seconds from the start of the process until it serves; medians of the rounds.

    `first_s` is with `adapters` files in the folder that no server has seen, `later_s` with the
    index that the one before has left.
    """

    adapters: int
    empty_s: float
    first_s: float
    later_s: float
    first_extra_s: float  # median of the rounds' differences from the empty folder
    later_extra_s: float
    empty_rounds_s: Sequence[float]
    first_rounds_s: Sequence[float]
    later_rounds_s: Sequence[float]


def measure(options: argparse.Namespace) -> Startup:
    """Writes --registered adapters into a folder, then starts servers in turn."""
    with tempfile.TemporaryDirectory(prefix="redmux-bench-") as parent:
        empty, full = Path(parent, "empty"), Path(parent, "full")
        empty.mkdir()
        with _serving(options, empty) as process:  # warms what is kept between starts, too
            asyncio.run(_fill(options, process, full))
        times: list[tuple[float, float, float]] = []
        with report.progress(3 * options.rounds, "start") as bar:
            for _ in range(options.rounds):
                (full / ".index.json").unlink(missing_ok=True)
                times.append(
                    (
                        _startup_s(options, empty, bar.update),
                        _startup_s(options, full, bar.update),
                        _startup_s(options, full, bar.update),
                    )
                )
    empties, firsts, laters = zip(*times, strict=True)
    return Startup(
        adapters=options.registered,
        empty_s=statistics.median(empties),
        first_s=statistics.median(firsts),
        later_s=statistics.median(laters),
        first_extra_s=statistics.median(first - empty for empty, first, _ in times),
        later_extra_s=statistics.median(later - empty for empty, _, later in times),
        empty_rounds_s=empties,
        first_rounds_s=firsts,
        later_rounds_s=laters,
    )


def _startup_s(options: argparse.Namespace, folder: Path, done: Callable[[], object]) -> float:
    with _serving(options, folder) as process:
        done()
        return process.startup_s


def _serving(options: argparse.Namespace, folder: Path) -> ServerProcess:
    return start(options, options.concurrency, "--adapter-dir", str(folder))


async def _fill(options: argparse.Namespace, process: ServerProcess, folder: Path) -> None:
    """Writes the files that a server would keep there; through one, it would take minutes."""
    async with process.client() as client:
        adapters = await RandomAdapters.of(client, options.model, options.seed)
    with report.progress(options.registered, "write") as bar:
        for _ in range(options.registered):
            name, content = adapters.new()
            path = folder / f"{name}.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            bar.update()


def print_startup(result: Startup) -> None:
    """Prints the starts and what the adapters add."""
    report.print_table(
        ("adapters in the folder", "s to ready", "s more"),
        [
            ("none", result.empty_s, 0.0),
            (f"{result.adapters}, first start", result.first_s, result.first_extra_s),
            (f"{result.adapters}, later start", result.later_s, result.later_extra_s),
        ],
    )
