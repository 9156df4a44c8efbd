"""Routes of what probes, scrapers and load balancers ask."""

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from redmux_server.http_api.offer import Offer
from redmux_server.http_api.schemas.other_answers import TEXT, Status, Version

_NOT_NOW: dict[int | str, dict[str, Any]] = {503: {"model": Status}}
_OPEN_METRICS = {"application/openmetrics-text": {"schema": {"type": "string"}}}
_METRICS: dict[int | str, dict[str, Any]] = {
    200: {"content": {**TEXT[200]["content"], **_OPEN_METRICS}}
}


def router(offer: Offer) -> APIRouter:
    """Returns the routes of health, version and metrics; all are open to everybody."""
    router = APIRouter(tags=["server"])

    def answer(request: Request) -> Response:
        found = offer.health.answer(request.url.path, request.headers.get("accept", "").encode())
        assert found is not None
        status, content_type, body = found
        return Response(body, status, {"content-type": content_type})

    @router.get("/health", response_model=Status, responses=_NOT_NOW)
    async def health(request: Request) -> Response:
        """Tells whether the process works: 503 once its engine is dead."""
        return answer(request)

    @router.get("/ready", response_model=Status, responses=_NOT_NOW)
    async def ready(request: Request) -> Response:
        """Tells whether requests are served now."""
        return answer(request)

    @router.get("/version", response_model=Version)
    async def version(request: Request) -> Response:
        """Tells the version of the server."""
        return answer(request)

    @router.get("/metrics", response_class=Response, responses=_METRICS)
    async def metrics(request: Request) -> Response:
        """Returns the metrics for Prometheus."""
        return answer(request)

    return router
