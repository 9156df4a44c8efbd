"""/v1/status: what the engine computes at this moment."""

from fastapi import APIRouter
from starlette.responses import Response

from redmux_server.http_api.answers import json_response
from redmux_server.http_api.offer import Offer
from redmux_server.http_api.schemas.other_answers import Load
from redmux_server.http_api.validated import KnownRoute
from redmux_server.load import load_message


def router(offer: Offer) -> APIRouter:
    """Returns the route of the status."""
    router = APIRouter(route_class=KnownRoute, tags=["server"])

    @router.get("/v1/status", response_model=Load)
    async def status() -> Response:
        """Tells the requests in the batch and in the queue, and the tokens since the start.

        Rows are counted by adapter without saying by which: they may be another caller's.
        """
        rows = offer.engine.running_adapters()
        num_base = rows.pop("", 0)
        load = load_message(offer.metrics)
        num_running = num_base + rows.total()
        return json_response({
            "generates": offer.services.generation is not None,
            "running": num_running,
            "waiting": max(0, offer.engine.num_open - num_running),
            "max_running": offer.config.max_running,
            "base_rows": num_base,
            "adapter_rows": sorted(rows.values(), reverse=True),
            "kv_cache_used": offer.engine.kv_used_ratio,
            "prefill_tokens": load.num_prompt_tokens,
            "decode_tokens": load.num_completion_tokens,
        })  # fmt: skip

    return router
