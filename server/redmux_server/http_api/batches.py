"""/v1/batches: files of requests, answered beside everything else."""

from typing import Annotated, Any

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response

from redmux_server.batches.batch import Batch
from redmux_server.http_api.answers import json_response
from redmux_server.http_api.generating import caller_of
from redmux_server.http_api.offer import Offer
from redmux_server.http_api.paging import page_of
from redmux_server.http_api.schemas.batch import BatchBody
from redmux_server.http_api.schemas.kept_answers import Batches, BatchTold
from redmux_server.http_api.validated import JsonRoute

_TIMES = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")


def router(offer: Offer) -> APIRouter:
    """Returns the routes of batches."""
    router = APIRouter(route_class=JsonRoute, tags=["batches"])
    batches = offer.desk.batches

    @router.post("/v1/batches", response_model=BatchTold)
    async def create_batch(request: Request, body: BatchBody) -> Response:
        """Takes a file of requests, one a line, for one endpoint."""
        batch = await batches.create(
            body.endpoint, body.input_file_id, body.window_s(), body.completion_window,
            body.metadata or {}, caller_of(request).tenant,
        )  # fmt: skip
        return json_response(_told(batch))

    @router.get("/v1/batches", response_model=Batches)
    async def list_batches(
        request: Request, after: str | None = None, limit: Annotated[int, Query(ge=1, le=100)] = 20
    ) -> Response:
        """Lists batches, the newest first."""
        found = batches.all_of(caller_of(request).tenant)
        return json_response(page_of(found, after, limit, _told))

    @router.get("/v1/batches/{batch_id}", response_model=BatchTold)
    async def retrieve_batch(request: Request, batch_id: str) -> Response:
        """Returns how far a batch is."""
        return json_response(_told(batches.get(batch_id, caller_of(request).tenant)))

    @router.post("/v1/batches/{batch_id}/cancel", response_model=BatchTold)
    async def cancel_batch(request: Request, batch_id: str) -> Response:
        """Ends a batch, which keeps the answers that it has."""
        return json_response(_told(await batches.cancel(batch_id, caller_of(request).tenant)))

    return router


def _told(batch: Batch) -> dict[str, Any]:
    times = {
        f"{status}_at": int(batch.entered_at[status]) if status in batch.entered_at else None
        for status in _TIMES
    }
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "errors": {"object": "list", "data": batch.errors} if batch.errors else None,
        "input_file_id": batch.input_file_id,
        "completion_window": batch.completion_window,
        "status": batch.status,
        "output_file_id": batch.output_file_id if batch.has_ended else None,
        "error_file_id": batch.error_file_id if batch.has_ended else None,
        "created_at": int(batch.created_at),
        "expires_at": int(batch.expires_at),
        **times,
        "request_counts": {
            "total": batch.num_lines,
            "completed": batch.num_completed,
            "failed": batch.num_failed,
        },
        "usage": {
            "input_tokens": batch.num_input_tokens,
            "input_tokens_details": {"cached_tokens": batch.num_cached_tokens},
            "output_tokens": batch.num_output_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": batch.num_input_tokens + batch.num_output_tokens,
        },
        "metadata": batch.metadata or None,
    }
