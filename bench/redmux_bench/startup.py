"""How long a server takes to be ready with a folder of many adapters, against an empty one."""

import argparse
import asyncio
import statistics
import tempfile
from pathlib import Path
from typing import Any

from redmux_bench import report
from redmux_bench.published import RandomAdapters
from redmux_bench.rounds import in_turn
from redmux_bench.server_process import ServerProcess, start
from redmux_bench.tables import print_table


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Writes --registered adapters into a folder, then starts servers in turn.

    Prints and returns the seconds from the start of a process until it serves: with an empty
    folder, with files that no server has seen (`first`), and with the index that the start before
    has left (`later`). Extras are medians of the rounds' differences from the empty folder.
    """
    with tempfile.TemporaryDirectory(prefix="redmux-bench-") as parent:
        empty, full = Path(parent, "empty"), Path(parent, "full")
        empty.mkdir()
        with _serving(options, empty) as process:  # warms what is kept between starts, too
            asyncio.run(_fill(options, process, full))
        with report.progress(3 * options.rounds, "start") as bar:

            def startup_s(folder: Path, has_index: bool = True) -> float:
                if not has_index:
                    (folder / ".index.json").unlink(missing_ok=True)
                with _serving(options, folder) as process:
                    bar.update()
                    return process.startup_s

            rounds = in_turn(
                options.rounds,
                lambda: startup_s(empty),
                lambda: startup_s(full, has_index=False),
                lambda: startup_s(full),
                warm_ups=0,
            )
    result: dict[str, Any] = {"adapters": options.registered}
    cells: list[tuple[str, float, float]] = []
    for kind, times in zip(("empty", "first", "later"), rounds, strict=True):
        result[f"{kind}_s"] = seconds = statistics.median(times)
        result[f"{kind}_rounds_s"] = times
        if kind == "empty":
            cells.append(("none", seconds, 0.0))
            continue
        extras = [time - empty for time, empty in zip(times, rounds[0], strict=True)]
        result[f"{kind}_extra_s"] = extra = statistics.median(extras)
        cells.append((f"{options.registered}, {kind} start", seconds, extra))
    print_table(("adapters in the folder", "s to ready", "s more"), cells)
    return result


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
