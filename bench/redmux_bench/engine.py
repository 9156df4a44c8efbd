"""`redmux bench engine`: the engine alone against the same load through gRPC and HTTP."""

import argparse
import asyncio
import statistics
import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Any

from redmux import RedmuxError
from redmux_adapters.bases.load import DEFAULT_MODEL
from redmux_bench import report
from redmux_bench.http_load import HttpLoad
from redmux_bench.load import LoadGenerator, Wave
from redmux_bench.lone_engine import LoneEngine
from redmux_bench.rounds import median_ratio, rotated
from redmux_bench.server_process import ServerProcess, serve_flags, start
from redmux_bench.summary import summarize
from redmux_bench.tables import print_table
from redmux_bench.workload import Planned, Workload
from redmux_server.config import load_config


@dataclass(frozen=True, slots=True)
class _Turn:
    """One wave: its throughput, the processor time per output token, and the first token's wait."""

    tokens_per_s: float
    own_cpu_ms: float
    server_cpu_ms: float
    first_token_ms: float = 0.0


def run(options: argparse.Namespace) -> int:
    """Measures all ways in turn, the engine in this process and a server in another."""
    config = load_config(serve_flags(options, options.concurrency))
    with start(options, options.concurrency) as process:
        row = asyncio.run(_measure(options, LoneEngine(config), process))
    print_table(
        ("streams", "engine tokens/s", "over gRPC", "ratio", "over HTTP", "ratio",
         "engine CPU ms/token", "server CPU", "client CPU", "over HTTP", "client CPU",
         "first ms gRPC", "HTTP"),
        [[value for value in row.values() if not isinstance(value, list)]],
    )  # fmt: skip
    report.write_json(options, config.model, {"rows": [row]})
    return 0


async def _measure(
    options: argparse.Namespace, lone: LoneEngine, process: ServerProcess
) -> dict[str, Any]:
    """Returns the same requests all ways, medians over the rounds.

    A ratio is the median of the rounds' ratios of throughput, wire over engine. Processor times
    are per output token, over all threads: of this process with the engine in it, of the server
    process, and of this process as the client.
    """
    workload = Workload(options.prompt_tokens, options.output_tokens, lone.vocab_size)
    alone: list[_Turn] = []
    grpc: list[_Turn] = []
    http: list[_Turn] = []
    load = HttpLoad(
        process.address.rpartition(":")[0], process.http_port, options.model or DEFAULT_MODEL,
        options.timeout,
    )  # fmt: skip
    async with process.client() as client:
        generator = LoadGenerator(client, timeout_s=options.timeout)
        lone.engine.start()
        try:
            with report.progress(1 + options.rounds, "round") as bar:
                for index in range(1 + options.rounds):  # the first one warms up
                    # Each way has prompts of its own, of which none is in the server's cache.
                    first, second = (
                        workload.plan(options.concurrency, [], (options.seed, way, index))
                        for way in (5, 6)
                    )
                    for way in rotated(range(3), index):
                        if way == 0:
                            alone.append(await _alone(lone, first))
                        elif way == 1:
                            wave = generator.run(first, len(first))
                            grpc.append(await _through(wave, process, "gRPC"))
                        else:
                            http.append(await _through(load.run(second), process, "HTTP"))
                    bar.update()
        finally:
            load.close()
            await lone.engine.stop()
    engine_rates, wire_rates, http_rates = (
        [turn.tokens_per_s for turn in turns[1:]] for turns in (alone, grpc, http)
    )

    def median(turns: Sequence[_Turn], what: str) -> float:
        return float(statistics.median(getattr(turn, what) for turn in turns[1:]))

    return {
        "streams": options.concurrency,
        "engine_tokens_per_s": statistics.median(engine_rates),
        "wire_tokens_per_s": statistics.median(wire_rates),
        "ratio": median_ratio(wire_rates, engine_rates),
        "http_tokens_per_s": statistics.median(http_rates),
        "http_ratio": median_ratio(http_rates, engine_rates),
        "engine_cpu_ms_per_token": median(alone, "own_cpu_ms"),
        "server_cpu_ms_per_token": median(grpc, "server_cpu_ms"),
        "client_cpu_ms_per_token": median(grpc, "own_cpu_ms"),
        "http_server_cpu_ms_per_token": median(http, "server_cpu_ms"),
        "http_client_cpu_ms_per_token": median(http, "own_cpu_ms"),
        "first_token_ms": median(grpc, "first_token_ms"),
        "http_first_token_ms": median(http, "first_token_ms"),
        "engine_rounds": engine_rates,
        "wire_rounds": wire_rates,
        "http_rounds": http_rates,
    }


async def _alone(lone: LoneEngine, requests: Sequence[Planned]) -> _Turn:
    cpu_s, started_s = time.process_time(), time.perf_counter()
    tokens = await lone.run(requests)
    elapsed_s = time.perf_counter() - started_s
    return _Turn(tokens / elapsed_s, 1e3 * (time.process_time() - cpu_s) / tokens, 0.0)


async def _through(running: Awaitable[Wave], process: ServerProcess, door: str) -> _Turn:
    server_cpu_s = process.cpu_s
    wave = await running
    server_cpu_s = process.cpu_s - server_cpu_s
    for call in wave.calls:
        if call.error is not None:
            raise RedmuxError(f"a request over {door} failed: {call.error}")
    summary = summarize(wave)
    assert summary.time_to_first_token_ms is not None
    ms_per_token = 1e3 / summary.output_tokens
    return _Turn(
        summary.output_tokens_per_s, ms_per_token * wave.client_cpu_s, ms_per_token * server_cpu_s,
        summary.time_to_first_token_ms.p50,
    )  # fmt: skip
