"""How long a server takes to be ready with a registry of many adapters, against an empty one."""

import argparse
import asyncio
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from redmux_adapters import to_bytes
from redmux_bench import report
from redmux_bench.adapters import random_adapter
from redmux_bench.published import RandomAdapters
from redmux_bench.rounds import in_turn
from redmux_bench.server_process import ServerProcess, start
from redmux_bench.tables import print_table
from redmux_server.registry import changes
from redmux_server.registry.database import Database
from redmux_server.registry.kept import KeptVersions
from redmux_server.registry.published import rules_of

_NUM_CONTENTS = 1000  # that names share, so that a hundred thousand of them fit on a disk
_AT_ONCE = 1000  # of one transaction


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Fills a registry with --registered adapters, then starts servers in turn.

    Prints and returns the seconds from the start of a process until it serves, and the memory that
    it holds then: with an empty registry and with the full one. What is more with the full one is
    the median of the rounds' differences.
    """
    with tempfile.TemporaryDirectory(prefix="redmux-bench-") as parent:
        empty, full = Path(parent, "empty"), Path(parent, "full")
        with _serving(options, empty) as process:  # warms what is kept between starts, too
            adapters = asyncio.run(_adapters(options, process))
        _fill(adapters, options.registered, full)
        with report.progress(2 * options.rounds, "start") as bar:
            resident: dict[Path, list[int]] = {empty: [], full: []}

            def startup_s(folder: Path) -> float:
                with _serving(options, folder) as process:
                    bar.update()
                    resident[folder].append(process.resident_bytes)
                    return process.startup_s

            rounds = in_turn(
                options.rounds, lambda: startup_s(empty), lambda: startup_s(full), warm_ups=0
            )
    result: dict[str, Any] = {"adapters": options.registered}
    for kind, times in zip(("empty", "full"), rounds, strict=True):
        result[f"{kind}_s"], result[f"{kind}_rounds_s"] = statistics.median(times), times
    result["extra_s"] = _median_difference(*rounds)
    result["bytes_per_adapter"] = (
        _median_difference(resident[empty], resident[full]) / options.registered
    )
    print_table(
        ("adapters", "s to ready", "s more", "bytes more for each"),
        [
            ("none", result["empty_s"], 0.0, 0.0),
            (str(options.registered), result["full_s"], result["extra_s"],
             result["bytes_per_adapter"]),
        ],
    )  # fmt: skip
    return result


def _median_difference(less: Sequence[float], more: Sequence[float]) -> float:
    return statistics.median(b - a for a, b in zip(less, more, strict=True))


def _serving(options: argparse.Namespace, folder: Path) -> ServerProcess:
    return start(options, options.concurrency, "--data-dir", str(folder))


async def _adapters(options: argparse.Namespace, process: ServerProcess) -> RandomAdapters:
    async with process.client() as client:
        return await RandomAdapters.of(client, options.model, options.seed)


def _fill(adapters: RandomAdapters, count: int, folder: Path) -> None:
    """Writes the rows that puts through a server would write; these would take minutes."""
    database = Database.in_folder(folder)
    base, sites = adapters.base_fingerprint, adapters.sites
    kept = KeptVersions(database, rules_of(base, sites, 0, (), lambda prompt_format: None, False))
    contents = [
        kept.checked(to_bytes(random_adapter(base, sites, adapters.seed + number)), "")[1]
        for number in range(min(count, _NUM_CONTENTS))
    ]
    with report.progress(count, "write") as bar:
        for first in range(0, count, _AT_ONCE):

            def write(connection: Any, first: int = first) -> None:
                for number in range(first, min(first + _AT_ONCE, count)):
                    new = contents[number % len(contents)]
                    changes.put(connection, f"bench/{number:06d}", new, False, "")
                    bar.update()

            database.write_now(write)
    database.close()
