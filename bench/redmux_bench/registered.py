"""What holding many adapters that nobody asks for costs: throughput and the server's memory."""

import argparse
import statistics
from typing import Any

from redmux import AsyncClient
from redmux_bench.load import LoadGenerator
from redmux_bench.published import RandomAdapters
from redmux_bench.server_process import ServerProcess
from redmux_bench.summary import summarize
from redmux_bench.tables import print_table
from redmux_bench.workload import Workload


async def measure(
    options: argparse.Namespace,
    client: AsyncClient,
    process: ServerProcess,
    adapters: RandomAdapters,
    workload: Workload,
) -> dict[str, Any]:
    """Prints and returns what --registered adapters beside those that the load uses change.

    The same load runs before they are registered, with them, and after their deletion; `ratio` is
    the throughput with them over the mean of the others. `resident_bytes` are the server's when a
    phase began, `bytes_per_adapter` their growth, `vector_bytes` what one's values take in fp32.
    """
    generator = LoadGenerator(client, timeout_s=options.timeout)

    async def phase(name: str) -> dict[str, Any]:
        resident_bytes = process.resident_bytes
        rates = []
        for index in range(options.rounds):
            requests = workload.plan(options.concurrency, names, (options.seed, 2, index))
            wave = await generator.run(requests, options.concurrency)
            rates.append(summarize(wave).output_tokens_per_s)
        return {
            "name": name, "output_tokens_per_s": statistics.median(rates), "rounds": rates,
            "resident_bytes": resident_bytes,
        }  # fmt: skip

    async with adapters.published(options.concurrency) as names:
        warm_up = workload.warm_up(options.concurrency, names, options.seed)
        await generator.run(warm_up, options.concurrency)
        before = await phase("before")
        async with adapters.published(options.registered):
            during = await phase("registered")
        after = await phase("deleted")
    phases = (before, during, after)
    around = statistics.mean(p["output_tokens_per_s"] for p in (before, after))
    growth = during["resident_bytes"] - before["resident_bytes"]
    result = {
        "adapters": options.registered,
        "phases": phases,
        "ratio": during["output_tokens_per_s"] / around,
        "bytes_per_adapter": growth / options.registered,
        "vector_bytes": adapters.vector_bytes,
    }
    print_table(
        (f"{options.registered} registered adapters", "tokens/s", "server MB"),
        [(p["name"], p["output_tokens_per_s"], p["resident_bytes"] / 1e6) for p in phases],
    )
    print(
        f"ratio {result['ratio']:.3f}; {result['bytes_per_adapter'] / 1e3:.1f} kB of memory per "
        f"adapter, of which its values are {adapters.vector_bytes / 1e3:.1f} kB"
    )
    return result
