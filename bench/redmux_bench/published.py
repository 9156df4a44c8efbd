"""Random adapters on a server: put, used and deleted again."""

import asyncio
import itertools
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TypeVar

from redmux import AsyncClient, RedmuxError
from redmux_adapters import to_bytes
from redmux_bench import report
from redmux_bench.adapters import model_sites, random_adapter

_T = TypeVar("_T")
_AT_ONCE = 4  # requests: while the server checks one adapter, the next is made here


@dataclass(frozen=True, slots=True)
class RandomAdapters:
    """Random adapters for one server, each different from all before; equal seeds give equal ones.

    They are named bench/SEED-NUMBER.
    """

    client: AsyncClient
    base_fingerprint: str
    sites: Mapping[str, int]
    seed: int
    numbers: Iterator[int] = field(default_factory=itertools.count)

    @classmethod
    async def of(cls, client: AsyncClient, model: str | None, seed: int) -> "RandomAdapters":
        """Asks the server which model it has; `model` is where this machine finds it instead."""
        info = await client.info()
        return cls(client, info.base_fingerprint, model_sites(model or info.model), seed)

    @property
    def vector_bytes(self) -> int:
        """Size of one adapter's values in fp32."""
        return 8 * sum(self.sites.values())

    def new(self) -> tuple[str, bytes]:
        """Returns the name and the safetensors file of the next adapter, which is not put yet."""
        number = next(self.numbers)
        # Far apart, so that neighbouring seeds do not share adapters.
        seed = self.seed * 1_000_003 + number
        adapter = random_adapter(self.base_fingerprint, self.sites, seed)
        return f"bench/{self.seed}-{number:05d}", to_bytes(adapter)

    @asynccontextmanager
    async def published(self, count: int) -> AsyncIterator[Sequence[str]]:
        """Puts the next `count` adapters, yields their names and deletes them at the end."""
        names: list[str] = []  # of what was put, also if a later one fails

        async def put(_: int) -> None:
            name, content = self.new()
            await self.client.adapters.put(name, content)
            names.append(name)

        async def delete(name: str) -> None:
            with suppress(RedmuxError):
                await self.client.adapters.delete(name)

        try:
            await _each(put, range(count), count, "put")
            names.sort()
            yield names
        finally:
            await _each(delete, list(names), len(names), "delete")


async def _each(
    call: Callable[[_T], Awaitable[None]], items: Iterable[_T], count: int, label: str
) -> None:
    """Calls with every item, a few at a time; raises the first error, once all calls have ended."""
    left = iter(items)

    async def work() -> None:
        for item in left:
            await call(item)
            bar.update()

    with report.progress(count, label) as bar:
        tasks = [asyncio.create_task(work()) for _ in range(_AT_ONCE)]
        try:
            await asyncio.gather(*tasks)
        finally:
            await cancel(tasks)


async def cancel(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Cancels the tasks that run and returns when all have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
