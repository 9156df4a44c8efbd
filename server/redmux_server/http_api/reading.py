"""/classify and /score, in vLLM's shapes."""

import math
from collections.abc import Sequence

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from redmux.errors import FailedPreconditionError
from redmux_adapters import HeadConfig
from redmux_server.http_api.answers import json_response
from redmux_server.http_api.embeddings import head, told
from redmux_server.http_api.generating import caller_of
from redmux_server.http_api.offer import Offer, adapter_header
from redmux_server.http_api.schemas.other_answers import Classes, Scores
from redmux_server.http_api.schemas.reading import ClassifyBody, ScoreBody
from redmux_server.http_api.validated import JsonRoute
from redmux_server.services.reading import Classifications, Embeddings
from redmux_server.services.spec import TextPair


def router(offer: Offer) -> APIRouter:
    """Returns the routes of classes and scores."""
    router = APIRouter(route_class=JsonRoute, tags=["reading"])
    reading = offer.services.reading

    @router.post("/classify", response_model=Classes)
    async def classify(request: Request, body: ClassifyBody) -> Response:
        """Returns what an adapter's head makes of each input."""
        tenant = caller_of(request).tenant
        await offer.names.resolve(body.model, tenant)
        done = await reading.classify(body.input, offer.names.adapter(body.model), tenant)
        labels = list(done.head.labels)
        data = [
            {
                "index": index,
                "label": labels[max(range(len(row)), key=row.__getitem__)],
                "probs": row,
                "num_classes": len(labels),
            }
            for index, row in enumerate(done.scores)
        ]
        more = {"labels": labels, "problem_type": done.head.problem_type, "logits": done.logits}
        answer = {**head("classify"), "data": data, **told(offer, body.model, done, **more)}
        return json_response(answer, adapter_header(done.published))

    @router.post("/score", response_model=Scores)
    @router.post("/v1/score", response_model=Scores)
    async def score(request: Request, body: ScoreBody) -> Response:
        """Returns how well two texts go together, by an adapter's head or by their vectors."""
        tenant = caller_of(request).tenant
        published = await offer.names.resolve(body.model, tenant)
        adapter = offer.names.adapter(body.model)
        pairs = body.pairs()
        done: Embeddings | Classifications
        config = None if published is None else published.summary.config.head
        if config is not None:
            place = _place_of_score(config)
            inputs = [TextPair(first, second) for first, second in pairs]
            done = await reading.classify(inputs, adapter, tenant)
            values = [row[place] for row in done.scores]
        else:
            texts = [text for pair in pairs for text in pair]
            done = await reading.embed(texts, adapter, None, True, tenant)
            values = [
                _cosine(done.vectors[index], done.vectors[index + 1])
                for index in range(0, len(texts), 2)
            ]
        data = [
            {"index": index, "object": "score", "score": value}
            for index, value in enumerate(values)
        ]
        answer = {**head("score"), "data": data, **told(offer, body.model, done)}
        return json_response(answer, adapter_header(done.published))

    return router


def _place_of_score(config: HeadConfig) -> int:
    """Returns which value of a head is the score of a pair: the only one, or that of "yes"."""
    if len(config.labels) > 2:
        raise FailedPreconditionError(
            f"the adapter's head has {len(config.labels)} labels, none of which is a score; use "
            "Classify"
        )
    return len(config.labels) - 1


def _cosine(first: Sequence[float], second: Sequence[float]) -> float:
    """Returns the cosine of two vectors of length 1."""
    return math.fsum(a * b for a, b in zip(first, second, strict=True))
