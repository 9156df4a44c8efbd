"""`redmux bench startup`: how long a server takes to be ready, at its first start and later."""

import argparse
import os
import statistics
import tempfile
from dataclasses import dataclass

from redmux_adapters.bases.load import DEFAULT_MODEL
from redmux_bench import report
from redmux_bench.server_process import ServerProcess, serve_flags
from redmux_bench.tables import print_table


@dataclass(frozen=True, slots=True)
class _Start:
    ready_s: float
    cpu_s: float
    rss_bytes: int


def run(options: argparse.Namespace) -> int:
    """Starts servers one after the other: with an empty cache folder, then with what that left."""
    with (
        tempfile.TemporaryDirectory(prefix="redmux-bench-") as cache,
        report.progress(1 + options.rounds, "start") as bar,
    ):

        def start() -> _Start:
            environ = os.environ | {"REDMUX_CACHE": cache}
            with ServerProcess(*serve_flags(options, 1), environ=environ) as process:
                bar.update()
                return _Start(process.startup_s, process.cpu_s, process.resident_bytes)

        first = start()
        later = [start() for _ in range(options.rounds)]
    later_s = statistics.median(s.ready_s for s in later)
    cpu_s = statistics.median(s.cpu_s for s in later)
    rss_bytes = int(statistics.median(s.rss_bytes for s in later))
    print_table(
        ("start", "s to ready", "s of processors", "MB resident"),
        [
            ("first", first.ready_s, first.cpu_s, first.rss_bytes / 1e6),
            ("later", later_s, cpu_s, rss_bytes / 1e6),
        ],
    )
    result = {
        "first_s": first.ready_s,
        "later_s": later_s,
        "rss_bytes": rss_bytes,
        "cpu_s": cpu_s,
        "first_cpu_s": first.cpu_s,
        "later_rounds": later,
    }
    report.write_json(options, options.model or DEFAULT_MODEL, result)
    return 0
