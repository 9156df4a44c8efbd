"""How long a server takes to be ready with a folder of many adapters, against an empty one."""

import argparse
import asyncio
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from redmux_bench import report
from redmux_bench.adapters import RandomAdapters
from redmux_bench.server_process import ServerProcess, start


@dataclass(frozen=True, slots=True)
class Startup:
    """Seconds from the start of the process until it serves; medians of the rounds."""

    adapters: int
    empty_s: float
    full_s: float
    extra_ms_per_adapter: float
    empty_rounds_s: Sequence[float]
    full_rounds_s: Sequence[float]


def measure(options: argparse.Namespace) -> Startup:
    """Lets a server keep --registered adapters in a folder, then starts servers in turn."""
    times_s: dict[str, list[float]] = {"empty": [], "full": []}
    with tempfile.TemporaryDirectory(prefix="redmux-bench-") as parent:
        with _serving(options, f"{parent}/full") as process:
            asyncio.run(_fill(options, process))
        Path(parent, "empty").mkdir()
        with report.progress(2 * options.rounds, "start") as bar:
            for _ in range(options.rounds):
                for name, times in times_s.items():
                    with _serving(options, f"{parent}/{name}") as process:
                        times.append(process.startup_s)
                    bar.update()
    empty_s, full_s = (statistics.median(times) for times in times_s.values())
    extra_ms = 1e3 * (full_s - empty_s) / options.registered
    return Startup(options.registered, empty_s, full_s, extra_ms, *times_s.values())


def _serving(options: argparse.Namespace, folder: str) -> ServerProcess:
    return start(options, options.concurrency, "--adapter-dir", folder)


async def _fill(options: argparse.Namespace, process: ServerProcess) -> None:
    async with process.client() as client:
        adapters = await RandomAdapters.of(client, options.model, options.seed)
        await adapters.put(options.registered)


def print_startup(result: Startup) -> None:
    """Prints both starts and what an adapter adds."""
    report.print_table(
        ("adapters in the folder", "s to ready"),
        [(0, result.empty_s), (result.adapters, result.full_s)],
    )
    print(f"{result.extra_ms_per_adapter:.3f} ms per adapter")
