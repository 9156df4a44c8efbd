"""`redmux bench serve`: loads of choice, their rates and latencies."""

import argparse
import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from redmux_bench import report
from redmux_bench.adapters import RandomAdapters
from redmux_bench.load import LoadGenerator, Wave
from redmux_bench.server_process import Target, reach
from redmux_bench.summary import Percentiles, Summary, summarize
from redmux_bench.workload import Lengths, Planned, Workload

_WARM_UP_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Load:
    """How requests come: `concurrency` open at a time, or at `rate` per second if that is set."""

    concurrency: int
    rate: float | None


def run(options: argparse.Namespace) -> int:
    """Measures each load; returns 1 if of one no request completed."""
    most = max(options.concurrency)
    loads = [Load(most, rate) for rate in options.rate or ()] or [
        Load(concurrency, None) for concurrency in options.concurrency
    ]
    with reach(options, most) as target:
        model, waves = asyncio.run(_measure(options, target, loads))
    summaries = [summarize(wave) for wave in waves]
    for load, summary, wave in zip(loads, summaries, waves, strict=True):
        _print(load, summary, wave)
    pairs = list(zip(loads, summaries, strict=True))
    rows = [asdict(load) | asdict(summary) for load, summary in pairs]
    report.write_json(options, model, {"rows": rows})
    if options.plot:
        from redmux_bench.plot import plot_latencies  # matplotlib takes a second to import

        plot_latencies(pairs, model, options.plot)
    return 0 if all(summary.num_completed for summary in summaries) else 1


async def _measure(
    options: argparse.Namespace, target: Target, loads: Sequence[Load]
) -> tuple[str, list[Wave]]:
    async with target.client() as client:
        info = await client.info()
        workloads = [
            Workload(
                options.prompt_tokens, options.output_tokens, info.vocab_size, options.assignment,
                options.zipf_exponent, load.rate,
            )
            for load in loads
        ]  # fmt: skip
        adapters = await RandomAdapters.of(client, options.model, options.seed)
        async with adapters.published(options.adapters) as names:
            settings = {"ignore_eos": options.ignore_eos, "timeout_s": options.timeout}
            most = max(load.concurrency for load in loads)
            warm_up = warm_up_requests(workloads[0], most, names, options.seed)
            await LoadGenerator(client, **settings).run(warm_up, most)
            waves = []
            with report.progress(len(loads) * options.num_requests, "request") as bar:
                generator = LoadGenerator(client, **settings, progress=bar.update)
                for number, (load, workload) in enumerate(zip(loads, workloads, strict=True)):
                    # Prompts of its own, so that no load profits from one before it.
                    seed = (options.seed, 1, number)
                    requests = workload.plan(options.num_requests, names, seed)
                    waves.append(await generator.run(requests, load.concurrency))
    return info.model, waves


def warm_up_requests(
    workload: Workload, concurrency: int, adapters: Sequence[str], seed: int
) -> list[Planned]:
    """Returns short requests that fill a batch and use every adapter once."""
    short = Lengths(_WARM_UP_TOKENS, _WARM_UP_TOKENS)
    closed = Workload(workload.prompt, short, workload.vocab_size)
    return closed.plan(max(concurrency, len(adapters)), adapters, (seed, 0))


def _print(load: Load, summary: Summary, wave: Wave) -> None:
    how = f"{load.rate:g} a second" if load.rate else f"{load.concurrency} at a time"
    print(
        f"{how}: {summary.num_completed} of {summary.num_requests} requests completed in "
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
    print()


def _cells(percentiles: Percentiles | None) -> tuple[float | None, ...]:
    if percentiles is None:
        return (None, None, None)
    return (percentiles.p50, percentiles.p90, percentiles.p99)
