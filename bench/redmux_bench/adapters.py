"""Random adapters for a load: of the size and magnitude of trained ones, each different."""

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
    """The random adapters of one server; equal numbers name equal adapters."""

    def __init__(
        self, client: AsyncClient, base_fingerprint: str, sites: Mapping[str, int], seed: int
    ) -> None:
        self._client = client
        self._base_fingerprint = base_fingerprint
        self._sites = sites
        self._seed = seed

    @classmethod
    async def of(cls, client: AsyncClient, model: str | None, seed: int) -> "RandomAdapters":
        """Asks the server which model it has; `model` is where this machine finds it instead."""
        info = await client.info()
        return cls(client, info.base_fingerprint, model_sites(model or info.model), seed)

    def name(self, index: int) -> str:
        """Returns the name under which adapter `index` is put."""
        return f"bench/{self._seed}-{index:05d}"

    def content(self, index: int) -> bytes:
        """Returns the safetensors file of adapter `index`."""
        # Far apart, so that the adapters of neighbouring seeds are not the same ones.
        seed = self._seed * 1_000_003 + index
        return to_bytes(random_adapter(self._base_fingerprint, self._sites, seed))

    @asynccontextmanager
    async def published(self, count: int) -> AsyncIterator[Sequence[str]]:
        """Puts adapters 0 to count - 1, yields their names and deletes them at the end."""
        names: list[str] = []
        try:
            with report.progress(count, "put") as bar:
                for index in range(count):
                    await self._client.adapters.put(self.name(index), self.content(index))
                    names.append(self.name(index))
                    bar.update()
            yield names
        finally:
            with report.progress(len(names), "delete") as bar:
                for name in names:
                    with suppress(RedmuxError):
                        await self._client.adapters.delete(name)
                    bar.update()
