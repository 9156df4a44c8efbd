"""/v1/models: the base model and the adapters that a caller sees."""

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from redmux.errors import PermissionDeniedError
from redmux_server.http_api.answers import json_response
from redmux_server.http_api.generating import caller_of
from redmux_server.http_api.offer import Offer
from redmux_server.http_api.schemas.other_answers import Model, ModelDeleted, Models
from redmux_server.http_api.validated import KnownRoute
from redmux_server.registry.published import Published

_PAGE = 1000


def router(offer: Offer) -> APIRouter:
    """Returns the routes of models."""
    router = APIRouter(route_class=KnownRoute, tags=["models"])

    def base() -> dict[str, Any]:
        return {
            "id": offer.names.base,
            "object": "model",
            "created": offer.created_s,
            "owned_by": "redmux",
            "root": offer.config.model,
            "parent": None,
            "max_model_len": offer.services.validator.max_context,
            "redmux": {"base_fingerprint": offer.fingerprint},
        }

    def adapter(published: Published) -> dict[str, Any]:
        return {
            "id": published.name,
            "object": "model",
            "created": int(published.created_at.timestamp()),
            "owned_by": "redmux",
            "root": published.digest,
            "parent": offer.names.base,
            "max_model_len": offer.services.validator.max_context,
            "redmux": {
                "digest": published.digest,
                "base_match": published.base_match,
                "description": published.summary.config.metadata.description,
            },
        }

    @router.get("/v1/models", response_model=Models)
    async def list_models(request: Request) -> Response:
        """Lists the base model, then adapters in order of name."""
        tenant = caller_of(request).tenant
        found: list[Published] = []
        while page := await offer.registry.page(found[-1].name if found else "", _PAGE, tenant):
            found += page
        return json_response({"object": "list", "data": [base(), *map(adapter, found)]})

    @router.get("/v1/models/{model:path}", response_model=Model)
    async def retrieve_model(request: Request, model: str) -> Response:
        """Returns what is known of the base model or of an adapter."""
        published = await offer.names.resolve(model, caller_of(request).tenant)
        return json_response(base() if published is None else adapter(published))

    @router.delete("/v1/models/{model:path}", response_model=ModelDeleted)
    async def delete_model(request: Request, model: str) -> Response:
        """Removes an adapter, such as one that was fine-tuned."""
        tenant = caller_of(request).tenant
        published = await offer.names.resolve(model, tenant)
        if published is None:
            raise PermissionDeniedError(f"{model[:128]!r} is the base model, which stays")
        # A digest, or a version of a name, is that version alone.
        adapter = offer.names.adapter(model)
        is_name = adapter == published.name
        await offer.registry.delete(published.name if is_name else published.reference, tenant)
        offer.on_change()
        return json_response({"id": model, "object": "model", "deleted": True})

    return router
