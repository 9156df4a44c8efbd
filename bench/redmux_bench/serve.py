"""`redmux bench serve`: loads of choice, their rates and latencies."""

import argparse
import asyncio
from dataclasses import asdict, replace
from typing import Any

from redmux_bench import report
from redmux_bench.load import LoadGenerator, Wave
from redmux_bench.published import RandomAdapters
from redmux_bench.server_process import Target, reach
from redmux_bench.summary import summarize
from redmux_bench.tables import print_table
from redmux_bench.workload import Workload

Row = dict[str, Any]
_LATENCIES = {
    "first token": "time_to_first_token_ms",
    "between tokens": "inter_token_ms",
    "whole request": "end_to_end_ms",
}


def run(options: argparse.Namespace) -> int:
    """Measures each load; returns 1 if of one no request completed."""
    most = max(options.concurrency)
    # A load is so many requests open at a time, or arrivals at `rate` per second if that is set.
    loads = [{"concurrency": most, "rate": rate} for rate in options.rate or ()] or [
        {"concurrency": concurrency, "rate": None} for concurrency in options.concurrency
    ]
    with reach(options, most) as target:
        model, waves = asyncio.run(_measure(options, target, loads))
    rows = [load | asdict(summarize(wave)) for load, wave in zip(loads, waves, strict=True)]
    for row, wave in zip(rows, waves, strict=True):
        _print(row, wave)
    report.write_json(options, model, {"rows": rows})
    if options.plot:
        from redmux_bench.plot import plot_latencies  # matplotlib takes a second to import

        plot_latencies(rows, model, options.plot)
    return 0 if all(row["num_completed"] for row in rows) else 1


async def _measure(
    options: argparse.Namespace, target: Target, loads: list[Row]
) -> tuple[str, list[Wave]]:
    async with target.client() as client:
        info = await client.info()
        workload = Workload(
            options.prompt_tokens, options.output_tokens, info.vocab_size, options.assignment,
            options.zipf_exponent,
        )  # fmt: skip
        adapters = await RandomAdapters.of(client, options.model, options.seed)
        async with adapters.published(options.adapters) as names:
            generator = LoadGenerator(client, options.ignore_eos, options.timeout)
            most = max(load["concurrency"] for load in loads)
            await generator.run(workload.warm_up(most, names, options.seed), most)
            waves = []
            with report.progress(len(loads) * options.num_requests, "request") as bar:
                for number, load in enumerate(loads):
                    # Prompts of its own, so that no load profits from one before it.
                    seed = (options.seed, 1, number)
                    timed = replace(workload, rate_per_s=load["rate"])
                    requests = timed.plan(options.num_requests, names, seed)
                    waves.append(await generator.run(requests, load["concurrency"], bar.update))
    return info.model, waves


def _print(row: Row, wave: Wave) -> None:
    how = f"{row['rate']:g} a second" if row["rate"] else f"{row['concurrency']} at a time"
    print(
        f"{how}: {row['num_completed']} of {row['num_requests']} requests completed in "
        f"{row['duration_s']:.1f} s, {row['client_cpu_s']:.1f} s of CPU in the client"
    )
    rates = ("output_tokens", "prompt_tokens", "requests")
    print_table(("throughput", "per s"), [(r.replace("_", " "), row[f"{r}_per_s"]) for r in rates])
    print()
    parts = ("p50", "p90", "p99")
    print_table(
        ("latency, ms", *parts),
        [
            (title, *((row[name] or dict.fromkeys(parts))[part] for part in parts))
            for title, name in _LATENCIES.items()
        ],
    )
    if row["failures"]:
        print()
        first = {type(c.error).__name__: c.error for c in reversed(wave.calls) if c.error}
        print_table(
            ("failures", "requests", "the first of them"),
            [(name, count, first[name]) for name, count in row["failures"].items()],
        )
    print()
