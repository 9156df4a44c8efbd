"""`redmux bench serve`: a load of choice, its rates and latencies."""

import argparse
import asyncio
from collections.abc import Sequence

from redmux_bench import report
from redmux_bench.adapters import RandomAdapters
from redmux_bench.load import LoadGenerator, Wave
from redmux_bench.server_process import Target, reach
from redmux_bench.summary import Percentiles, Summary, summarize
from redmux_bench.workload import Lengths, Planned, Workload

_WARM_UP_TOKENS = 8


def run(options: argparse.Namespace) -> int:
    """Measures one load; returns 1 if no request of it completed."""
    with reach(options, options.concurrency) as target:
        model, wave = asyncio.run(_measure(options, target))
    summary = summarize(wave)
    _print(summary, wave)
    report.write_json(options, model, {"rows": [summary]})
    return 0 if summary.num_completed else 1


async def _measure(options: argparse.Namespace, target: Target) -> tuple[str, Wave]:
    async with target.client() as client:
        info = await client.info()
        workload = Workload(
            options.prompt_tokens, options.output_tokens, info.vocab_size, options.assignment,
            options.zipf_exponent, options.rate,
        )  # fmt: skip
        adapters = await RandomAdapters.of(client, options.model, options.seed)
        async with adapters.published(options.adapters) as names:
            settings = {"ignore_eos": options.ignore_eos, "timeout_s": options.timeout}
            warm_up = warm_up_requests(workload, options.concurrency, names, options.seed)
            await LoadGenerator(client, **settings).run(warm_up, options.concurrency)
            requests = workload.plan(options.num_requests, names, options.seed)
            with report.progress(len(requests), "request") as bar:
                generator = LoadGenerator(client, **settings, progress=bar.update)
                return info.model, await generator.run(requests, options.concurrency)


def warm_up_requests(
    workload: Workload, concurrency: int, adapters: Sequence[str], seed: int
) -> list[Planned]:
    """Returns short requests that fill a batch and use every adapter once."""
    short = Lengths(_WARM_UP_TOKENS, _WARM_UP_TOKENS)
    closed = Workload(workload.prompt, short, workload.vocab_size)
    return closed.plan(max(concurrency, len(adapters)), adapters, (seed, 0))


def _print(summary: Summary, wave: Wave) -> None:
    print(
        f"{summary.num_completed} of {summary.num_requests} requests completed in "
        f"{summary.duration_s:.1f} s, {summary.client_cpu_s:.1f} s of CPU in the client"
    )
    report.print_table(
        ("throughput", "per s"),
        [
            ("output tokens", summary.output_tokens_per_s),
            ("prompt tokens", summary.prompt_tokens_per_s),
            ("requests", summary.requests_per_s),
        ],
    )
    print()
    report.print_table(
        ("latency, ms", "p50", "p90", "p99"),
        [
            ("first token", *_cells(summary.time_to_first_token_ms)),
            ("between tokens", *_cells(summary.inter_token_ms)),
            ("whole request", *_cells(summary.end_to_end_ms)),
        ],
    )
    if summary.failures:
        print()
        first = {type(c.error).__name__: c.error for c in reversed(wave.calls) if c.error}
        report.print_table(
            ("failures", "requests", "the first of them"),
            [(name, count, first[name]) for name, count in summary.failures.items()],
        )


def _cells(percentiles: Percentiles | None) -> tuple[float | None, ...]:
    if percentiles is None:
        return (None, None, None)
    return (percentiles.p50, percentiles.p90, percentiles.p99)
