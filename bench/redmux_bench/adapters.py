"""Random adapters for a load: of the size and magnitude of trained ones, each different."""

import itertools
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress

import torch

from redmux import AsyncClient, RedmuxError
from redmux_adapters import Adapter, Edit, ffn_sites, to_bytes
from redmux_adapters.base import resolve
from redmux_bench import report


def random_adapter(base_fingerprint: str, sites: Mapping[str, int], seed: int) -> Adapter:
    """Returns an adapter of every site: scales 1 + 0.1 * normal, biases 0.05 * normal."""
    generator = torch.Generator().manual_seed(seed)
    edits = {
        site: Edit(
            1 + 0.1 * torch.randn(dim, generator=generator),
            0.05 * torch.randn(dim, generator=generator),
        )
        for site, dim in sites.items()
    }
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

    async def put(self, count: int) -> list[str]:
        """Puts the next `count` adapters and returns their names."""
        names: list[str] = []
        await self._put(count, names)
        return names

    @asynccontextmanager
    async def published(self, count: int) -> AsyncIterator[Sequence[str]]:
        """Puts the next `count` adapters, yields their names and deletes them at the end."""
        names: list[str] = []
        try:
            await self._put(count, names)
            yield names
        finally:
            with report.progress(len(names), "delete") as bar:
                for name in names:
                    with suppress(RedmuxError):
                        await self._client.adapters.delete(name)
                    bar.update()

    async def _put(self, count: int, names: list[str]) -> None:
        """Appends each name once it is put, so that after a failure it is known what was."""
        with report.progress(count, "put") as bar:
            for _ in range(count):
                name, content = self.new()
                await self._client.adapters.put(name, content)
                names.append(name)
                bar.update()
