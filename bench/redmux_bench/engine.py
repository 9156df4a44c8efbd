"""`redmux bench engine`: the engine alone against the same load through gRPC."""

import argparse
import asyncio
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from redmux import RedmuxError
from redmux_bench import report
from redmux_bench.load import LoadGenerator
from redmux_bench.server_process import ServerProcess, serve_flags, start
from redmux_bench.summary import median_ratio, summarize
from redmux_bench.workload import Planned, Workload
from redmux_server.config import ServerConfig, load_config
from redmux_server.device import choose
from redmux_server.engine.blocks import BlockPool
from redmux_server.engine.engine import Engine
from redmux_server.engine.request import Event, Failed, Request, SamplingParams, Token
from redmux_server.engine.scheduler import Scheduler
from redmux_server.metrics import Metrics
from redmux_server.models.load_causal import load_causal


@dataclass(frozen=True, slots=True)
class EngineRow:
    """The same `streams` requests both ways; medians over the rounds.

    `ratio` is the median of the rounds' ratios of throughput, wire over engine. Processor times
    are per output token, over all threads: of this process with the engine in it, of the server
    process, and of this process as the client.
    """

    streams: int
    engine_tokens_per_s: float
    wire_tokens_per_s: float
    ratio: float
    engine_cpu_ms_per_token: float
    server_cpu_ms_per_token: float
    client_cpu_ms_per_token: float
    engine_rounds: Sequence[float]
    wire_rounds: Sequence[float]


@dataclass(frozen=True, slots=True)
class _Turn:
    """One wave: its throughput and the processor seconds per output token."""

    tokens_per_s: float
    own_cpu_s: float
    server_cpu_s: float


class LoneEngine:
    """An engine in this process, with nothing between the caller and its events."""

    def __init__(self, config: ServerConfig) -> None:
        model = load_causal(config, choose(config))
        self.vocab_size = model.vocab_size
        scheduler = Scheduler(
            BlockPool(model.num_blocks, model.block_size, model.max_idle_blocks),
            max_running=config.max_running,
            max_batch_tokens=config.max_batch_tokens,
        )
        self._engine = Engine(
            model.runner, scheduler, model.bank, Metrics(),
            max_open=config.max_running + config.max_queue,
        )  # fmt: skip

    def start(self) -> None:
        """Starts the engine's thread; call it inside the event loop."""
        self._engine.start()

    async def stop(self) -> None:
        """Ends the engine's thread."""
        await self._engine.stop()

    async def run(self, planned: Sequence[Planned]) -> int:
        """Submits all requests at once; returns their tokens once all have ended.

        Raises the error of a request that fails.
        """
        num_tokens, num_open = 0, len(planned)
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def take(event: Event) -> None:
            nonlocal num_tokens, num_open
            if isinstance(event, Token):
                num_tokens += 1
                return
            num_open -= 1
            if isinstance(event, Failed) and not ended.done():
                ended.set_exception(event.error)
            elif not num_open and not ended.done():
                ended.set_result(None)

        for request in planned:
            self._engine.submit(
                Request(
                    prompt_ids=list(request.prompt_ids), max_tokens=request.output_tokens,
                    sampling=SamplingParams(), stop_token_ids=frozenset(), tenant="",
                    adapter=None, logprobs=False, sink=take,
                )
            )  # fmt: skip
        await ended
        return num_tokens


def run(options: argparse.Namespace) -> int:
    """Measures both ways in turn, the engine in this process and a server in another."""
    config = load_config(serve_flags(options, options.concurrency))
    with start(options, options.concurrency) as process:
        row = asyncio.run(_measure(options, LoneEngine(config), process))
    report.print_table(
        ("streams", "engine tokens/s", "over gRPC", "ratio", "engine CPU ms/token",
         "server CPU", "client CPU"),
        [(row.streams, row.engine_tokens_per_s, row.wire_tokens_per_s, row.ratio,
          row.engine_cpu_ms_per_token, row.server_cpu_ms_per_token, row.client_cpu_ms_per_token)],
    )  # fmt: skip
    report.write_json(options, config.model, {"rows": [row]})
    return 0


async def _measure(
    options: argparse.Namespace, engine: LoneEngine, process: ServerProcess
) -> EngineRow:
    workload = Workload(options.prompt_tokens, options.output_tokens, engine.vocab_size)
    alone: list[_Turn] = []
    wire: list[_Turn] = []
    async with process.client() as client:
        generator = LoadGenerator(client, timeout_s=options.timeout)
        engine.start()
        try:
            with report.progress(1 + options.rounds, "round") as bar:
                for index in range(1 + options.rounds):  # the first one warms up
                    requests = workload.plan(options.concurrency, [], (options.seed, 5, index))
                    alone.append(await _alone(engine, requests))
                    wire.append(await _through_grpc(generator, process, requests))
                    bar.update()
        finally:
            await engine.stop()
    return _row(options.concurrency, alone[1:], wire[1:])


async def _alone(engine: LoneEngine, requests: Sequence[Planned]) -> _Turn:
    cpu_s, started_s = time.process_time(), time.perf_counter()
    tokens = await engine.run(requests)
    elapsed_s = time.perf_counter() - started_s
    return _Turn(tokens / elapsed_s, (time.process_time() - cpu_s) / tokens, 0.0)


async def _through_grpc(
    generator: LoadGenerator, process: ServerProcess, requests: Sequence[Planned]
) -> _Turn:
    server_cpu_s = process.cpu_s
    wave = await generator.run(requests, len(requests))
    server_cpu_s = process.cpu_s - server_cpu_s
    for call in wave.calls:
        if call.error is not None:
            raise RedmuxError(f"a request over gRPC failed: {call.error}")
    summary = summarize(wave)
    return _Turn(
        summary.output_tokens_per_s,
        wave.client_cpu_s / summary.output_tokens,
        server_cpu_s / summary.output_tokens,
    )


def _row(streams: int, alone: Sequence[_Turn], wire: Sequence[_Turn]) -> EngineRow:
    engine_rates = [turn.tokens_per_s for turn in alone]
    wire_rates = [turn.tokens_per_s for turn in wire]
    return EngineRow(
        streams=streams,
        engine_tokens_per_s=statistics.median(engine_rates),
        wire_tokens_per_s=statistics.median(wire_rates),
        ratio=median_ratio(wire_rates, engine_rates),
        engine_cpu_ms_per_token=1e3 * statistics.median(turn.own_cpu_s for turn in alone),
        server_cpu_ms_per_token=1e3 * statistics.median(turn.server_cpu_s for turn in wire),
        client_cpu_ms_per_token=1e3 * statistics.median(turn.own_cpu_s for turn in wire),
        engine_rounds=engine_rates,
        wire_rounds=wire_rates,
    )
