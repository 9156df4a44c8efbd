"""Routes of what probes, scrapers and load balancers ask."""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from redmux_server.http_api.offer import Offer


def router(offer: Offer) -> APIRouter:
    """Returns the routes of health, version and metrics; all are open to everybody."""
    router = APIRouter(tags=["server"])

    def answer(request: Request) -> Response:
        found = offer.health.answer(request.url.path, request.headers.get("accept", "").encode())
        assert found is not None
        status, content_type, body = found
        return Response(body, status, {"content-type": content_type})

    @router.get("/health")
    async def health(request: Request) -> Response:
        """Tells whether the process works: 503 once its engine is dead."""
        return answer(request)

    @router.get("/ready")
    async def ready(request: Request) -> Response:
        """Tells whether requests are served now."""
        return answer(request)

    @router.get("/version")
    async def version(request: Request) -> Response:
        """Tells the version of the server."""
        return answer(request)

    @router.get("/metrics")
    async def metrics(request: Request) -> Response:
        """Returns the metrics for Prometheus."""
        return answer(request)

    return router
