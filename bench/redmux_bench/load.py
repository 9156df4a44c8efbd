"""The load generator: sends planned requests through the client and notes when tokens come."""

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from redmux import AsyncClient, RedmuxError
from redmux_bench.workload import Planned


@dataclass(frozen=True, slots=True)
class Call:
    """What became of one request; times are seconds since the start of its wave."""

    num_prompt_tokens: int
    started_s: float  # when it was due: in an open loop a late sender counts as the server's wait
    token_times_s: tuple[float, ...]  # tokens that come in one message share their time
    ended_s: float
    error: RedmuxError | None


@dataclass(frozen=True, slots=True)
class Wave:
    """A load that has ended. `client_cpu_s` is the processor time of this process meanwhile."""

    calls: Sequence[Call]
    duration_s: float
    client_cpu_s: float


@dataclass(frozen=True, slots=True)
class LoadGenerator:
    """Sends loads through one client. A request that fails is counted and stops no other."""

    client: AsyncClient
    ignore_eos: bool = True
    timeout_s: float = 600.0  # of each request

    async def run(
        self,
        requests: Sequence[Planned],
        concurrency: int,
        progress: Callable[[], object] = lambda: None,
    ) -> Wave:
        """Sends all requests and returns when each of them has ended, which `progress` is told.

        Requests with a due time are sent at that time, however many are open. The others form a
        closed loop: `concurrency` are open at any time, and the next is sent when one ends.
        """
        cpu_s = time.process_time()
        start_s = time.perf_counter()
        if any(request.due_s is not None for request in requests):
            concurrency = len(requests)
        calls: list[Call] = []
        left = iter(requests)

        async def work() -> None:
            for request in left:
                calls.append(await self._send(request, start_s))
                progress()

        await asyncio.gather(*(work() for _ in range(concurrency)))
        return Wave(calls, time.perf_counter() - start_s, time.process_time() - cpu_s)

    async def _send(self, request: Planned, start_s: float) -> Call:
        if request.due_s is not None:
            await asyncio.sleep(request.due_s - (time.perf_counter() - start_s))
        started_s = time.perf_counter() - start_s if request.due_s is None else request.due_s
        times_s: list[float] = []
        error: RedmuxError | None = None
        try:
            stream = self.client.stream(
                request.prompt_ids, adapter=request.adapter, max_tokens=request.output_tokens,
                ignore_eos=self.ignore_eos, timeout_s=self.timeout_s,
            )  # fmt: skip
            async with aclosing(stream):
                async for chunk in stream:
                    times_s += [time.perf_counter() - start_s] * len(chunk.token_ids)
        except RedmuxError as err:
            error = err
        ended_s = time.perf_counter() - start_s
        return Call(len(request.prompt_ids), started_s, tuple(times_s), ended_s, error)
