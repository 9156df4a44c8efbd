"""AdapterServicer: adapters while the server runs."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from redmux.errors import InvalidArgumentError
from redmux.v1 import adapter_service_pb2 as adapter_pb
from redmux.v1.adapter_service_pb2_grpc import AdapterServiceServicer
from redmux_server.grpc_api.call_keys import CallKeys
from redmux_server.grpc_api.converted import fill_page
from redmux_server.registry.catalogue import Alias
from redmux_server.registry.published import Published
from redmux_server.registry.registry import AdapterRegistry

_DEFAULT_PAGE, _MAX_PAGE = 100, 1000


class AdapterServicer(AdapterServiceServicer):
    """Adapters while the server runs; a key sees its own and the operator's."""

    def __init__(
        self, registry: AdapterRegistry, on_change: Callable[[], None], keys: CallKeys
    ) -> None:
        self._registry = registry
        self._on_change = on_change
        self._keys = keys

    async def PutAdapter(
        self, request: adapter_pb.PutAdapterRequest, context: Any
    ) -> adapter_pb.PutAdapterResponse:
        """Checks and publishes an adapter."""
        published, created = await self._registry.put(
            request.name,
            request.safetensors,
            request.config_json,
            request.replace,
            self._keys.tenant(context),
        )
        self._on_change()
        return adapter_pb.PutAdapterResponse(adapter=await self._told(published), created=created)

    async def GetAdapter(
        self, request: adapter_pb.GetAdapterRequest, context: Any
    ) -> adapter_pb.GetAdapterResponse:
        """Returns what is known of an adapter."""
        published = await self._registry.resolve(request.name, self._keys.tenant(context))
        return adapter_pb.GetAdapterResponse(adapter=await self._told(published))

    async def DownloadAdapter(
        self, request: adapter_pb.DownloadAdapterRequest, context: Any
    ) -> adapter_pb.DownloadAdapterResponse:
        """Returns the file of an adapter to whoever may change it."""
        tenant = self._keys.tenant(context)
        published, data = await self._registry.file(request.name, tenant)
        return adapter_pb.DownloadAdapterResponse(
            adapter=await self._told(published), safetensors=data
        )

    async def ListAdapters(
        self, request: adapter_pb.ListAdaptersRequest, context: Any
    ) -> adapter_pb.ListAdaptersResponse:
        """Returns a page of adapters in order of name, or of versions; its token is the last's."""
        if request.page_size < 0:
            raise InvalidArgumentError(f"page_size is {request.page_size}, must be 0 or more")
        size, tenant = (
            min(request.page_size or _DEFAULT_PAGE, _MAX_PAGE),
            self._keys.tenant(context),
        )
        if request.name:
            below = _number(request.page_token)
            found = await self._registry.versions(request.name, below, size + 1, tenant)
        else:
            found = await self._registry.page(request.page_token, size + 1, tenant)
        page, has_more = fill_page(await self._all_told(found), size)
        last = page[-1] if has_more else adapter_pb.Adapter()
        return adapter_pb.ListAdaptersResponse(
            adapters=page,
            next_page_token=(str(last.version) if request.name else last.name) if has_more else "",
        )

    async def DeleteAdapter(
        self, request: adapter_pb.DeleteAdapterRequest, context: Any
    ) -> adapter_pb.DeleteAdapterResponse:
        """Removes a name or a version."""
        published = await self._registry.delete(request.name, self._keys.tenant(context))
        self._on_change()
        return adapter_pb.DeleteAdapterResponse(adapter=await self._told(published))

    async def SetAlias(
        self, request: adapter_pb.SetAliasRequest, context: Any
    ) -> adapter_pb.SetAliasResponse:
        """Points an alias at a version."""
        published = await self._registry.set_alias(
            request.name, request.alias, request.version, self._keys.tenant(context)
        )
        return adapter_pb.SetAliasResponse(adapter=await self._told(published))

    async def DeleteAlias(
        self, request: adapter_pb.DeleteAliasRequest, context: Any
    ) -> adapter_pb.DeleteAliasResponse:
        """Removes an alias."""
        tenant = self._keys.tenant(context)
        await self._registry.delete_alias(request.name, request.alias, tenant)
        return adapter_pb.DeleteAliasResponse()

    async def _told(self, published: Published) -> adapter_pb.Adapter:
        return next(iter(await self._all_told([published])))

    async def _all_told(self, found: Sequence[Published]) -> Iterable[adapter_pb.Adapter]:
        aliases = await self._registry.aliases({published.name for published in found})
        return (_adapter(published, aliases.get(published.name, ())) for published in found)


def _number(page_token: str) -> int:
    if page_token and not (page_token.isascii() and page_token.isdigit() and len(page_token) < 10):
        raise InvalidArgumentError(f"page_token is {page_token[:80]!r}, give the last page's")
    return int(page_token or 0)


def _adapter(published: Published, aliases: Iterable[Alias]) -> adapter_pb.Adapter:
    summary = published.summary
    message = adapter_pb.Adapter(
        name=published.name,
        digest=summary.digest,
        base_fingerprint=summary.config.base_fingerprint,
        base_match=published.base_match,
        apply=summary.config.apply,
        num_sites=summary.num_sites,
        num_parameters=summary.num_parameters,
        size_bytes=summary.nbytes,
        description=summary.config.metadata.description,
        version=published.number,
        aliases=[adapter_pb.AdapterAlias(name=a.name, version=a.number) for a in aliases],
    )
    message.created_at.FromDatetime(published.created_at)
    return message
