"""`redmux bench load`: what putting adapters, holding many and starting with many takes."""

import argparse
import asyncio

from redmux import InvalidArgumentError
from redmux_bench import put_latency, registered, report, startup
from redmux_bench.published import RandomAdapters
from redmux_bench.server_process import ServerProcess, start
from redmux_bench.workload import Workload


def run(options: argparse.Namespace) -> int:
    """Measures on a server of its own, and on more of them for --startup."""
    if options.startup and not options.registered:
        raise InvalidArgumentError("--startup needs --registered N, the number of adapters")
    with start(options, max(options.concurrency, options.streams + 1)) as process:
        model, results = asyncio.run(_measure(options, process))
    if options.startup:
        results["startup"] = startup.measure(options)
    report.write_json(options, model, results)
    return 0


async def _measure(
    options: argparse.Namespace, process: ServerProcess
) -> tuple[str, dict[str, object]]:
    results: dict[str, object] = {}
    async with process.client() as client:
        info = await client.info()
        workload = Workload(options.prompt_tokens, options.output_tokens, info.vocab_size)
        adapters = await RandomAdapters.of(client, options.model, options.seed)
        results["rows"] = await put_latency.measure(options, client, adapters, workload)
        if options.registered:
            results["registered"] = await registered.measure(
                options, client, process, adapters, workload
            )
    return info.model, results
