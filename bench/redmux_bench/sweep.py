"""`redmux bench sweep`: what K distinct adapters cost, against the same load without any."""

import argparse
import asyncio
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from redmux_bench import report
from redmux_bench.load import LoadGenerator, Wave
from redmux_bench.published import RandomAdapters
from redmux_bench.rounds import median_ratio, rotated
from redmux_bench.server_process import Target, reach
from redmux_bench.summary import failures, summarize
from redmux_bench.tables import print_table
from redmux_bench.workload import Workload


def run(options: argparse.Namespace) -> int:
    """Measures all numbers of adapters; returns 1 if a wave without adapters had no success."""
    if options.plot:
        from redmux_bench.plot import plot_sweep  # a missing matplotlib is told before the work
    with reach(options, options.concurrency) as target:
        model, waves = asyncio.run(_measure(options, target))
    if any(not summarize(wave).output_tokens for wave in waves[0]):
        print(f"no request without an adapter completed: {failures(waves[0])}")
        return 1
    rows = [_row(k, waves[k], waves[0]) for k in options.adapters]
    print_table(
        ("adapters", "tokens/s", "ratio", "first token ms", "between tokens ms", "failed"),
        [
            (r["adapters"], r["output_tokens_per_s"], r["ratio"], r["time_to_first_token_ms"],
             r["inter_token_ms"], sum(r["failures"].values()))
            for r in rows
        ],
    )  # fmt: skip
    report.write_json(options, model, {"rows": rows})
    if options.plot:
        plot_sweep(rows, options.concurrency, model, options.plot)
    return 0


async def _measure(
    options: argparse.Namespace, target: Target
) -> tuple[str, Mapping[int, list[Wave]]]:
    """Returns the model and, for each number of adapters, its wave of every round."""
    waves: dict[int, list[Wave]] = {k: [] for k in options.adapters}
    # The same number of requests for every K, and enough of them that each adapter has one.
    num_requests = max(*options.adapters, options.concurrency)
    async with target.client() as client:
        info = await client.info()
        workload = Workload(options.prompt_tokens, options.output_tokens, info.vocab_size)
        adapters = await RandomAdapters.of(client, options.model, options.seed)
        async with adapters.published(max(options.adapters)) as names:
            generator = LoadGenerator(client, timeout_s=options.timeout)
            warm_up = workload.warm_up(options.concurrency, names, options.seed)
            await generator.run(warm_up, options.concurrency)
            with report.progress(options.rounds * len(waves) * num_requests, "request") as bar:
                for index in range(options.rounds):
                    for k in rotated(options.adapters, index):
                        # Prompts of its own, so that no wave profits from one before it.
                        seed = (options.seed, 1, index, k)
                        requests = workload.plan(num_requests, names[:k], seed)
                        waves[k].append(
                            await generator.run(requests, options.concurrency, bar.update)
                        )
    return info.model, waves


def _row(adapters: int, waves: Sequence[Wave], references: Sequence[Wave]) -> dict[str, Any]:
    """Returns medians over the rounds with one number of adapters.

    `ratio` is the median of `ratios`, each round's throughput over that of no adapters in the
    same round.
    """
    summaries = [summarize(wave) for wave in waves]
    rates = [s.output_tokens_per_s for s in summaries]
    base = [summarize(wave).output_tokens_per_s for wave in references]
    first = [s.time_to_first_token_ms.p50 for s in summaries if s.time_to_first_token_ms]
    gaps = [s.inter_token_ms.p50 for s in summaries if s.inter_token_ms]
    return {
        "adapters": adapters,
        "output_tokens_per_s": statistics.median(rates),
        "ratio": median_ratio(rates, base),
        "time_to_first_token_ms": statistics.median(first) if first else None,
        "inter_token_ms": statistics.median(gaps) if gaps else None,
        "rounds": rates,
        "ratios": [rate / b for rate, b in zip(rates, base, strict=True)],
        "failures": failures(waves),
    }
