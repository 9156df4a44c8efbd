"""/v1/adapters, and adapters loaded by their paths in vLLM's and SGLang's shapes."""

import asyncio
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from redmux.errors import InvalidArgumentError, NotFoundError, PermissionDeniedError
from redmux_adapters.format.files import read_parts
from redmux_server.http_api.answers import json_response
from redmux_server.http_api.generating import caller_of
from redmux_server.http_api.offer import Offer, adapter_header
from redmux_server.http_api.schemas.adapters import LoadBody, UnloadBody
from redmux_server.http_api.schemas.other_answers import (
    TEXT,
    AdapterDeleted,
    AdapterPut,
    Adapters,
    AdapterTold,
    LoadedAdapters,
)
from redmux_server.http_api.validated import JsonRoute, KnownRoute
from redmux_server.registry.catalogue import Alias
from redmux_server.registry.published import Published
from redmux_server.registry.tenants import sees_all

_BYTES = "application/octet-stream"
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_FILE: dict[int | str, dict[str, Any]] = {200: {"content": {_BYTES: _BINARY}}}
_DEFAULT_PAGE, _MAX_PAGE = 100, 1000


def router(offer: Offer) -> APIRouter:
    """Returns the routes of adapters."""
    router = APIRouter(route_class=KnownRoute, tags=["adapters"])
    registry = offer.registry

    async def all_told(found: Sequence[Published]) -> list[dict[str, Any]]:
        aliases = await registry.aliases({published.name for published in found})
        return [_told(published, aliases.get(published.name, ())) for published in found]

    async def told(published: Published) -> dict[str, Any]:
        return (await all_told([published]))[0]

    @router.get("/v1/adapters", response_model=Adapters)
    async def list_adapters(
        request: Request, after: str = "", limit: int = Query(_DEFAULT_PAGE, ge=1, le=_MAX_PAGE)
    ) -> Response:
        """Lists adapters in order of name: those behind `after`, up to `limit`."""
        found = await registry.page(after, limit + 1, caller_of(request).tenant)
        page = await all_told(found[:limit])
        return json_response({
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
            "has_more": len(found) > limit,
        })  # fmt: skip

    @router.get("/v1/adapters/{name:path}", response_model=AdapterTold, responses=_FILE)
    async def get_adapter(request: Request, name: str) -> Response:
        """Returns what is known of an adapter, or its file where that is what is accepted."""
        tenant = caller_of(request).tenant
        if request.headers.get("accept") == _BYTES:
            published, data = await registry.file(name, tenant)
            return Response(data, headers=adapter_header(published), media_type=_BYTES)
        published = await registry.resolve(name, tenant)
        return json_response(await told(published), adapter_header(published))

    @router.put(
        "/v1/adapters/{name:path}",
        response_model=AdapterPut,
        responses={201: {"model": AdapterPut, "description": "The name is new."}},
        openapi_extra={"requestBody": {"required": True, "content": {
            _BYTES: _BINARY,
        }}},
    )  # fmt: skip
    async def put_adapter(request: Request, name: str, replace: bool = False) -> Response:
        """Publishes an adapter: a safetensors file with its configuration in its metadata."""
        kind = request.headers.get("content-type", _BYTES)
        if kind not in (_BYTES, "application/safetensors", "application/x-safetensors"):
            raise InvalidArgumentError(f"content-type is {kind[:80]!r}, must be {_BYTES}")
        data = await request.body()
        if not data:
            raise InvalidArgumentError("the body is empty; send the bytes of a safetensors file")
        published, created = await registry.put(name, data, "", replace, caller_of(request).tenant)
        offer.on_change()
        answer = {**await told(published), "created_now": created}
        return json_response(answer, adapter_header(published), 201 if created else 200)

    @router.delete("/v1/adapters/{name:path}", response_model=AdapterDeleted)
    async def delete_adapter(request: Request, name: str) -> Response:
        """Removes a name, or one version of it: `name@3`."""
        published = await registry.delete(name, caller_of(request).tenant)
        offer.on_change()
        answer = {"id": published.name, "object": "adapter.deleted", "deleted": True}
        return json_response(answer, adapter_header(published))

    return router


def loading_router(offer: Offer) -> APIRouter:
    """Returns the routes of adapters that lie in a folder of the server."""
    router = APIRouter(route_class=JsonRoute, tags=["adapters"])

    async def load(request: Request, body: LoadBody) -> None:
        tenant = caller_of(request).tenant
        if not sees_all(tenant):
            raise PermissionDeniedError(
                "only the admin key loads adapters by their paths, since others' lie there, too; "
                "PUT yours to /v1/adapters/{name}"
            )
        data, config = await asyncio.to_thread(_read, offer, body.lora_path)
        await offer.registry.put(body.lora_name, data, config or "", body.load_inplace, tenant)
        offer.on_change()

    async def unload(request: Request, body: UnloadBody) -> None:
        await offer.registry.delete(body.lora_name, caller_of(request).tenant)
        offer.on_change()

    async def loaded(request: Request) -> dict[str, Any]:
        page = await offer.registry.page("", _MAX_PAGE, caller_of(request).tenant)
        return {
            "success": True, "error_message": "",
            "loaded_adapters": {published.name: published.digest for published in page},
        }  # fmt: skip

    @router.post("/v1/load_lora_adapter", response_class=Response, responses=TEXT)
    async def load_lora_adapter(request: Request, body: LoadBody) -> Response:
        """Publishes an adapter that lies in an allowed folder, as vLLM does."""
        await load(request, body)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @router.post("/v1/unload_lora_adapter", response_class=Response, responses=TEXT)
    async def unload_lora_adapter(request: Request, body: UnloadBody) -> Response:
        """Removes a name, as vLLM does."""
        await unload(request, body)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    @router.post("/load_lora_adapter", response_model=LoadedAdapters)
    async def load_as_sglang(request: Request, body: LoadBody) -> Response:
        """Publishes an adapter that lies in an allowed folder, as SGLang does."""
        await load(request, body)
        return json_response(await loaded(request))

    @router.post("/unload_lora_adapter", response_model=LoadedAdapters)
    async def unload_as_sglang(request: Request, body: UnloadBody) -> Response:
        """Removes a name, as SGLang does."""
        await unload(request, body)
        return json_response(await loaded(request))

    return router


def _read(offer: Offer, given: str) -> tuple[bytes, str | None]:
    """Returns the parts of an adapter at a path; raises unless it is inside an allowed folder."""
    folders = [
        Path(folder).resolve()
        for folder in (offer.config.load_dir, offer.config.adapter_dir)
        if folder
    ]
    if not folders:
        raise PermissionDeniedError(
            "this server loads nothing by its path; start it with --load-dir, or PUT the bytes to "
            "/v1/adapters/{name}"
        )
    if "\0" in given:
        raise InvalidArgumentError("lora_path holds a zero byte")
    try:
        # A relative path begins in the first folder; links are followed before it is judged.
        path = (folders[0] / given).resolve()
        exists = path.exists()
    except (OSError, RuntimeError) as err:
        raise InvalidArgumentError(
            f"lora_path {given[:256]!r} cannot be looked at: {err}"
        ) from None
    if not any(path.is_relative_to(folder) for folder in folders):
        raise PermissionDeniedError(
            f"lora_path {given[:256]!r} is outside of {' and '.join(map(str, folders))}"
        )
    if not exists:
        raise NotFoundError(f"there is no file or folder at lora_path {given[:256]!r}")
    return read_parts(path)


def _told(published: Published, aliases: Iterable[Alias]) -> dict[str, Any]:
    summary = published.summary
    return {
        "id": published.name,
        "object": "adapter",
        "digest": summary.digest,
        "base_fingerprint": summary.config.base_fingerprint,
        "base_match": published.base_match,
        "apply": summary.config.apply,
        "num_sites": summary.num_sites,
        "num_parameters": summary.num_parameters,
        "size_bytes": summary.nbytes,
        "description": summary.config.metadata.description,
        "created_at": int(published.created_at.timestamp()),
        "version": published.number,
        "aliases": {alias.name: alias.number for alias in aliases},
    }
