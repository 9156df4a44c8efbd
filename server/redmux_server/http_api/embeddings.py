"""/v1/embeddings and /pooling: vectors of inputs."""

import secrets
import time
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from redmux_server.engine.request import Pooling
from redmux_server.http_api.answers import json_response
from redmux_server.http_api.deadline import within
from redmux_server.http_api.generating import caller_of, timeout_of
from redmux_server.http_api.offer import Offer, adapter_header, applied
from redmux_server.http_api.schemas.other_answers import EmbeddingList, PooledList
from redmux_server.http_api.schemas.reading import (
    ClassifyBody,
    EmbeddingBody,
    PoolingBody,
    encoded,
)
from redmux_server.http_api.validated import JsonRoute
from redmux_server.services.reading import Classifications, Embeddings


def router(offer: Offer) -> APIRouter:
    """Returns the routes of vectors."""
    router = APIRouter(route_class=JsonRoute, tags=["reading"])

    async def embed(request: Request, body: EmbeddingBody) -> Embeddings:
        caller = caller_of(request)
        adapter = await offer.names.wanted(body.model, body.mix, caller.tenant)
        pooling = None if body.pooling is None else Pooling(body.pooling)
        async with within(timeout_of(caller, body.timeout, streams=False)):
            return await offer.services.reading.embed(
                body.input,
                adapter,
                pooling,
                body.normalize,
                caller.tenant,
                body.priority or 0,
            )

    @router.post("/v1/embeddings", response_model=EmbeddingList)
    async def create_embeddings(request: Request, body: EmbeddingBody) -> Response:
        """Returns a vector of each input, of length 1 unless `normalize` is false."""
        done = await embed(request, body)
        data = [
            {
                "object": "embedding",
                "index": index,
                "embedding": encoded(vector, body.encoding_format),
            }
            for index, vector in enumerate(done.vectors)
        ]
        answer = {"object": "list", "data": data, **told(offer, body.model, done)}
        return json_response(answer, adapter_header(done.published))

    @router.post("/pooling", response_model=PooledList)
    async def pool(request: Request, body: PoolingBody) -> Response:
        """Returns a vector of each input as it is, or the scores of its classes."""
        done: Embeddings | Classifications
        if body.task == "classify":
            done = await classified(offer, request, body)
            rows = done.scores
        else:
            done = await embed(request, body)
            rows = done.vectors
        data = [
            {"object": "pooling", "index": index, "data": encoded(row, body.encoding_format)}
            for index, row in enumerate(rows)
        ]
        answer = {**head("pool"), "data": data, **told(offer, body.model, done)}
        return json_response(answer, adapter_header(done.published))

    return router


async def classified(
    offer: Offer, request: Request, body: ClassifyBody | PoolingBody
) -> Classifications:
    """Returns what an adapter's head makes of the inputs of a request."""
    caller = caller_of(request)
    adapter = await offer.names.wanted(body.model, body.mix, caller.tenant)
    async with within(timeout_of(caller, body.timeout, streams=False)):
        return await offer.services.reading.classify(
            body.input, adapter, caller.tenant, body.priority or 0
        )


def head(kind: str) -> dict[str, Any]:
    """Returns how an answer of vLLM's shapes begins."""
    return {"id": f"{kind}-{secrets.token_hex(12)}", "object": "list", "created": int(time.time())}


def told(
    offer: Offer, model: str, done: Embeddings | Classifications, **more: Any
) -> dict[str, Any]:
    """Returns how an answer ends; `more` goes under `redmux`."""
    return {
        "model": model,
        "usage": {
            "prompt_tokens": done.num_tokens,
            "total_tokens": done.num_tokens,
            "completion_tokens": 0,
        },
        "system_fingerprint": offer.fingerprint,
        "redmux": {
            **applied(done.published),
            "added_special_tokens": done.num_added_tokens,
            **more,
        },
    }
