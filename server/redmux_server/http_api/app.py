"""The application of the HTTP door: its routers, and how errors look."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route

import redmux
from redmux.errors import RedmuxError
from redmux_server.files.store import MAX_FILE_BYTES
from redmux_server.http_api import (
    adapters,
    batches,
    chat,
    completions,
    embeddings,
    files,
    fine_tuning,
    models,
    playground,
    probes,
    reading,
    reference,
    responses,
    side_by_side,
    status,
    tokens,
)
from redmux_server.http_api.answers import error_response
from redmux_server.http_api.errors import Refusal
from redmux_server.http_api.gate import App
from redmux_server.http_api.missing import missing
from redmux_server.http_api.multipart import FORM_BYTES
from redmux_server.http_api.offer import Offer
from redmux_server.http_api.schemas.answers import Failure
from redmux_server.http_api.validated import refusal_of
from redmux_server.internal_errors import told

logger = logging.getLogger(__name__)

_FAILURES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": Failure, "description": "The request is at fault."},
    "5XX": {"model": Failure, "description": "The server is at fault, or has no time."},
}
_CONFIG_BYTES = 1 << 20  # of what comes with an adapter's file


def make_app(offer: Offer) -> App:
    """Returns the application over a loaded server."""
    app = FastAPI(
        title="redmux", version=redmux.__version__, docs_url=None, redoc_url=None,
        description="Many RED adapters on one resident base model, in OpenAI's shapes.",
    )  # fmt: skip
    routers = (
        completions.router(offer),
        chat.router(offer),
        responses.router(offer),
        embeddings.router(offer),
        reading.router(offer),
        tokens.router(offer),
        models.router(offer),
        adapters.router(offer),
        adapters.loading_router(offer),
        files.router(offer),
        fine_tuning.router(offer),
        batches.router(offer),
        side_by_side.router(),
        status.router(offer),
        probes.router(offer),
        playground.router(),
        reference.router(app.openapi),
    )
    for router in routers:
        app.include_router(router, responses=_FAILURES)

    @app.exception_handler(RedmuxError)
    async def redmux_error(request: Request, err: RedmuxError) -> Any:
        return error_response(told(err))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, err: RequestValidationError) -> Any:
        return error_response(refusal_of(err.errors()))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, err: HTTPException) -> Any:
        if err.status_code == 404:
            paths = [route.path for route in _routes(routers)]
            return error_response(missing(request.url.path, paths))
        refusal = Refusal(str(err.detail), status=err.status_code, code="http_error")
        headers = {"allow": _methods(routers, request)} if err.status_code == 405 else err.headers
        return error_response(refusal, headers)

    @app.exception_handler(Exception)
    async def internal(request: Request, err: Exception) -> Any:
        return error_response(told(err))

    return app


def _routes(routers: Sequence[APIRouter]) -> list[Route]:
    return [route for router in routers for route in router.routes if isinstance(route, Route)]


def _methods(routers: Sequence[APIRouter], request: Request) -> str:
    """Returns the methods of all routes of a path; each route knows its own alone."""
    here = [r for r in _routes(routers) if r.matches(request.scope)[0] is not Match.NONE]
    return ", ".join(sorted({method for route in here for method in route.methods or ()}))


def body_limits(offer: Offer) -> Mapping[str, int]:
    """Returns the most bytes of bodies by beginning of path, of those with a limit of their own."""
    return {
        "/v1/adapters/": offer.registry.max_file_bytes + _CONFIG_BYTES,
        "/v1/files": MAX_FILE_BYTES + FORM_BYTES,
    }
