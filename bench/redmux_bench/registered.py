"""What holding many adapters that nobody asks for costs: throughput and the server's memory."""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from redmux import AsyncClient
from redmux_bench import report
from redmux_bench.adapters import RandomAdapters
from redmux_bench.load import LoadGenerator
from redmux_bench.serve import warm_up_requests
from redmux_bench.server_process import ServerProcess
from redmux_bench.summary import summarize
from redmux_bench.workload import Workload


@dataclass(frozen=True, slots=True)
class Phase:
    """The same load, before the adapters were registered, with them, or after their deletion."""

    name: str
    output_tokens_per_s: float  # median of the rounds
    rounds: Sequence[float]
    resident_bytes: int  # of the server process, when the phase began


@dataclass(frozen=True, slots=True)
class Registered:
    """`ratio` is the throughput with them over the mean of before and after their deletion."""

    adapters: int
    phases: Sequence[Phase]
    ratio: float
    bytes_per_adapter: float  # growth of the server's resident memory
    vector_bytes: int  # what an adapter's values take in fp32


async def measure(
    options: argparse.Namespace,
    client: AsyncClient,
    process: ServerProcess,
    adapters: RandomAdapters,
    workload: Workload,
) -> Registered:
    """Returns the three phases with --registered adapters beside those that the load uses."""
    generator = LoadGenerator(client, timeout_s=options.timeout)

    async def phase(name: str) -> Phase:
        resident_bytes = process.resident_bytes
        rates = []
        for index in range(options.rounds):
            requests = workload.plan(options.concurrency, names, (options.seed, 2, index))
            wave = await generator.run(requests, options.concurrency)
            rates.append(summarize(wave).output_tokens_per_s)
        return Phase(name, statistics.median(rates), rates, resident_bytes)

    async with adapters.published(options.concurrency) as names:
        warm_up = warm_up_requests(workload, options.concurrency, names, options.seed)
        await generator.run(warm_up, options.concurrency)
        before = await phase("before")
        async with adapters.published(options.registered):
            during = await phase("registered")
        after = await phase("deleted")
    around = statistics.mean((before.output_tokens_per_s, after.output_tokens_per_s))
    growth = during.resident_bytes - before.resident_bytes
    return Registered(
        adapters=options.registered,
        phases=[before, during, after],
        ratio=during.output_tokens_per_s / around,
        bytes_per_adapter=growth / options.registered,
        vector_bytes=adapters.vector_bytes,
    )


def print_registered(result: Registered) -> None:
    """Prints the phases and what an adapter takes."""
    report.print_table(
        (f"{result.adapters} registered adapters", "tokens/s", "server MB"),
        [(p.name, p.output_tokens_per_s, p.resident_bytes / 1e6) for p in result.phases],
    )
    print(
        f"ratio {result.ratio:.3f}; {result.bytes_per_adapter / 1e3:.1f} kB of memory per adapter, "
        f"of which its values are {result.vector_bytes / 1e3:.1f} kB"
    )
