"""ModelNames: what a request's `model` stands for."""

from collections.abc import Sequence

from redmux.errors import NotFoundError
from redmux_server.http_api.errors import ModelNotFound, Refusal
from redmux_server.http_api.schemas.mix import MixBody
from redmux_server.registry.published import Published
from redmux_server.registry.registry import AdapterRegistry
from redmux_server.services.spec import AdapterRef


class ModelNames:
    """The base model's names, and the adapters beside it.

    The base has the name that it was configured by, and those that were given to it. Everything
    else is an adapter: its name, its digest, or either of them behind the base's name and a colon.
    A name of the base's is never an adapter's; `base:adapter` reaches one that is called the same.
    """

    def __init__(self, model: str, served: Sequence[str], registry: AdapterRegistry) -> None:
        """`served` are further names of the base; the first one is shown in lists."""
        self._names = (*served, model)
        self._registry = registry

    @property
    def base(self) -> str:
        """The base's name in lists and answers."""
        return self._names[0]

    def adapter(self, model: str) -> str:
        """Returns what services call the adapter that is meant, "" for the base model."""
        if model in self._names:
            return ""
        for name in self._names:
            if model.startswith(f"{name}:"):
                return model[len(name) + 1 :]
        return model

    async def wanted(self, model: str, mix: MixBody | None, tenant: str) -> AdapterRef:
        """Returns the adapter that is meant, "" for the base model, or the mix.

        Raises as `resolve` does. All that is computed for the request is of this version.
        """
        published = await self.resolve(model, tenant)
        if mix is None:
            return published or ""
        if published is not None:
            raise Refusal(
                f"model is the adapter {self.adapter(model)[:80]!r} and mix has others; give the "
                f"base model {self.base!r} with a mix", param="mix",
            )  # fmt: skip
        return mix.mix()

    async def resolve(self, model: str, tenant: str) -> Published | None:
        """Returns the adapter that is meant, None for the base model.

        Raises ModelNotFound where there is none, and DataLossError where its file is damaged.
        """
        adapter = self.adapter(model)
        if not adapter and model not in self._names:  # "base:", or nothing at all
            raise ModelNotFound(f"model {model[:128]!r} names no adapter behind the colon")
        if not adapter:
            return None
        try:
            return await self._registry.resolve(adapter, tenant)
        except NotFoundError as err:
            raise ModelNotFound(
                f"the model {model[:256]!r} does not exist; the base model is {self.base!r}, and "
                f"there is {err.message}"
            ) from None
