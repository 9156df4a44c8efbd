"""From putting an adapter to its first token, on an idle server and beside running streams."""

import argparse
import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import Any

from redmux import AsyncClient
from redmux_bench import report
from redmux_bench.load import LoadGenerator
from redmux_bench.published import RandomAdapters, cancel
from redmux_bench.summary import Percentiles
from redmux_bench.tables import print_table
from redmux_bench.workload import Planned, Workload


async def measure(
    options: argparse.Namespace, client: AsyncClient, adapters: RandomAdapters, workload: Workload
) -> list[dict[str, Any]]:
    """Prints and returns times on the idle server and beside --streams streams of the base model.

    `put_to_first_token_ms` is `put_ms` and the first token after it; `resident_ms` is the first
    token of an adapter that was used before; `extra_ms` is the difference between the two that
    were measured one after the other.
    """
    rows: list[dict[str, Any]] = []
    async with adapters.published(1) as (resident,):
        await _first_token_s(client, *workload.plan(1, [resident], options.seed))
        with report.progress(2 * options.samples, "put") as bar:
            for streams in (0, options.streams):
                samples = []
                async with _background(client, workload, streams, options.seed):
                    for index in range(options.samples):
                        name, content = adapters.new()
                        seed = (options.seed, 3, streams, index)
                        old, new = workload.plan(2, [resident, name], seed)
                        samples.append(await _sample(client, content, old, new))
                        bar.update()
                put, fresh, warm = zip(*samples, strict=True)
                extra = [f - w for f, w in zip(fresh, warm, strict=True)]
                rows.append({
                    "background_streams": streams, "put_ms": Percentiles.of(put),
                    "put_to_first_token_ms": Percentiles.of(fresh),
                    "resident_ms": Percentiles.of(warm), "extra_ms": Percentiles.of(extra),
                })  # fmt: skip
    print_table(
        ("background streams", "put ms", "put to first token ms", "resident ms", "extra ms",
         "extra p90"),
        [
            (row["background_streams"], row["put_ms"].p50, row["put_to_first_token_ms"].p50,
             row["resident_ms"].p50, row["extra_ms"].p50, row["extra_ms"].p90)
            for row in rows
        ],
    )  # fmt: skip
    print()
    return rows


async def _sample(
    client: AsyncClient, content: bytes, old: Planned, new: Planned
) -> tuple[float, float, float]:
    """Returns the seconds of a put, of it and the first token behind it, and of `old`'s."""
    assert new.adapter is not None
    resident_s = await _first_token_s(client, old)
    started_s = time.perf_counter()
    await client.adapters.put(new.adapter, content)
    put_s = time.perf_counter() - started_s
    return put_s, put_s + await _first_token_s(client, new), resident_s


async def _first_token_s(client: AsyncClient, request: Planned) -> float:
    wave = await LoadGenerator(client).run([replace(request, output_tokens=1)], 1)
    (call,) = wave.calls
    if call.error is not None:
        raise call.error
    return call.token_times_s[0] - call.started_s


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
        await cancel(tasks)


def _raise_failures(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Raises the error of a stream that ended, and so left less load than there should be."""
    for task in tasks:
        if task.done():
            task.result()
