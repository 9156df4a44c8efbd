"""Random adapters for a load: of the size and magnitude of trained ones, each different."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TypeVar

import torch

from redmux import AsyncClient, RedmuxError
from redmux_adapters import Adapter, Edit, ffn_sites, to_bytes
from redmux_adapters.bases.load import resolve
from redmux_bench import report

_T = TypeVar("_T")
_AT_ONCE = 4  # requests: while the server checks one adapter, the next is made here


def random_adapter(base_fingerprint: str, sites: Mapping[str, int], seed: int) -> Adapter:
    """Returns an adapter of every site: scales 1 + 0.1 * normal, biases 0.05 * normal."""
    generator = torch.Generator().manual_seed(seed)
    dims = list(sites.values())
    scales, biases = torch.randn(2, sum(dims), generator=generator)
    pairs = zip((1 + 0.1 * scales).split(dims), (0.05 * biases).split(dims), strict=True)
    edits = {site: Edit(*pair) for site, pair in zip(sites, pairs, strict=True)}
    return Adapter(base_fingerprint, edits)


def model_sites(model: str) -> dict[str, int]:
    """Returns {module path: output size} of RED's sites of a model, without loading its weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(resolve(model), trust_remote_code=False)
    with torch.device("meta"):
        return ffn_sites(AutoModelForCausalLM.from_config(config, trust_remote_code=False))


class RandomAdapters:
    """Random adapters for one server, each different from all before; equal seeds give equal ones.

    They are named bench/SEED-NUMBER.
    """

    def __init__(
        self, client: AsyncClient, base_fingerprint: str, sites: Mapping[str, int], seed: int
    ) -> None:
        self._client = client
        self._base_fingerprint = base_fingerprint
        self._sites = sites
        self._seed = seed
        self._numbers = itertools.count()

    @classmethod
    async def of(cls, client: AsyncClient, model: str | None, seed: int) -> "RandomAdapters":
        """Asks the server which model it has; `model` is where this machine finds it instead."""
        info = await client.info()
        return cls(client, info.base_fingerprint, model_sites(model or info.model), seed)

    @property
    def vector_bytes(self) -> int:
        """Size of one adapter's values in fp32."""
        return 8 * sum(self._sites.values())

    def new(self) -> tuple[str, bytes]:
        """Returns the name and the safetensors file of the next adapter, which is not put yet."""
        number = next(self._numbers)
        # Far apart, so that neighbouring seeds do not share adapters.
        seed = self._seed * 1_000_003 + number
        adapter = random_adapter(self._base_fingerprint, self._sites, seed)
        return f"bench/{self._seed}-{number:05d}", to_bytes(adapter)

    @asynccontextmanager
    async def published(self, count: int) -> AsyncIterator[Sequence[str]]:
        """Puts the next `count` adapters, yields their names and deletes them at the end."""
        names: list[str] = []  # of what was put, also if a later one fails

        async def put(_: int) -> None:
            name, content = self.new()
            await self._client.adapters.put(name, content)
            names.append(name)

        async def delete(name: str) -> None:
            with suppress(RedmuxError):
                await self._client.adapters.delete(name)

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
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
