"""From putting an adapter to its first token, on an idle server and beside running streams."""

import argparse
import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass

from redmux import AsyncClient
from redmux_bench import report
from redmux_bench.adapters import RandomAdapters
from redmux_bench.summary import Percentiles
from redmux_bench.workload import Planned, Workload


@dataclass(frozen=True, slots=True)
class PutLatency:
    """Times beside `background_streams` streams, in milliseconds.

    `put_to_first_token_ms` is `put_ms` and the first token after it; `resident_ms` is the first
    token of an adapter that was used before; `extra_ms` is the difference between the two that
    were measured one after the other.
    """

    background_streams: int
    put_ms: Percentiles
    put_to_first_token_ms: Percentiles
    resident_ms: Percentiles
    extra_ms: Percentiles


@dataclass(frozen=True, slots=True)
class _Sample:
    put_s: float
    fresh_s: float  # put and first token
    resident_s: float


async def measure(
    options: argparse.Namespace, client: AsyncClient, adapters: RandomAdapters, workload: Workload
) -> list[PutLatency]:
    """Returns the latencies on the idle server and beside --streams streams of the base model."""
    rows = []
    async with adapters.published(1) as (resident,):
        await _first_token_s(client, *workload.plan(1, [resident], options.seed))
        with report.progress(2 * options.samples, "put") as bar:
            for streams in (0, options.streams):
                samples = []
                async with _background(client, workload, streams, options.seed):
                    for index in range(options.samples):
                        seed = (options.seed, 3, streams, index)
                        samples.append(await _sample(client, adapters, resident, workload, seed))
                        bar.update()
                rows.append(_row(streams, samples))
    return rows


async def _sample(
    client: AsyncClient,
    adapters: RandomAdapters,
    resident: str,
    workload: Workload,
    seed: Sequence[int],
) -> _Sample:
    name, content = adapters.new()
    old, new = workload.plan(2, [resident, name], seed)
    resident_s = await _first_token_s(client, old)
    started_s = time.perf_counter()
    await client.adapters.put(name, content)
    put_s = time.perf_counter() - started_s
    return _Sample(put_s, put_s + await _first_token_s(client, new), resident_s)


async def _first_token_s(client: AsyncClient, request: Planned) -> float:
    started_s = time.perf_counter()
    stream = client.stream(
        request.prompt_ids, adapter=request.adapter, max_tokens=1, ignore_eos=True
    )
    elapsed_s = 0.0
    async with aclosing(stream):
        async for chunk in stream:
            if chunk.token_ids:
                elapsed_s = time.perf_counter() - started_s
    return elapsed_s


@asynccontextmanager
async def _background(
    client: AsyncClient, workload: Workload, num_streams: int, seed: int
) -> AsyncIterator[None]:
    """Keeps streams running inside the block, each followed by another when it ends."""

    async def keep_streaming(index: int, has_begun: asyncio.Event) -> None:
        for turn in itertools.count():
            (request,) = workload.plan(1, [], (seed, 4, index, turn))
            stream = client.stream(
                request.prompt_ids, max_tokens=request.output_tokens, ignore_eos=True
            )
            try:
                async with aclosing(stream):
                    async for _ in stream:
                        has_begun.set()
            finally:
                has_begun.set()  # nobody is to wait for one that failed

    begun = [asyncio.Event() for _ in range(num_streams)]
    tasks = [asyncio.create_task(keep_streaming(i, event)) for i, event in enumerate(begun)]
    try:
        await asyncio.gather(*(event.wait() for event in begun))
        _raise_failures(tasks)
        yield
        _raise_failures(tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _raise_failures(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Raises the error of a stream that ended, and so left less load than there should be."""
    for task in tasks:
        if task.done():
            task.result()


def _row(streams: int, samples: Sequence[_Sample]) -> PutLatency:
    return PutLatency(
        background_streams=streams,
        put_ms=Percentiles.of([s.put_s for s in samples]),
        put_to_first_token_ms=Percentiles.of([s.fresh_s for s in samples]),
        resident_ms=Percentiles.of([s.resident_s for s in samples]),
        extra_ms=Percentiles.of([s.fresh_s - s.resident_s for s in samples]),
    )
