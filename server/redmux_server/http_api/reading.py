"""/classify and /score, in vLLM's shapes."""

import math
from collections.abc import Sequence

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from redmux.errors import FailedPreconditionError
from redmux_adapters import HeadConfig
from redmux_server.http_api.answers import json_response
from redmux_server.http_api.deadline import within
from redmux_server.http_api.embeddings import classified, head, told
from redmux_server.http_api.generating import caller_of, timeout_of
from redmux_server.http_api.offer import Offer, adapter_header
from redmux_server.http_api.schemas.other_answers import Classes, Scores
from redmux_server.http_api.schemas.reading import ClassifyBody, ScoreBody
from redmux_server.http_api.validated import JsonRoute
from redmux_server.registry.published import Published
from redmux_server.services.reading import Classifications, Embeddings
from redmux_server.services.spec import TextPair


def router(offer: Offer) -> APIRouter:
    """Returns the routes of classes and scores."""
    router = APIRouter(route_class=JsonRoute, tags=["reading"])

    @router.post("/classify", response_model=Classes)
    async def classify(request: Request, body: ClassifyBody) -> Response:
        """Returns what an adapter's head makes of each input."""
        done = await classified(offer, request, body)
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
        caller = caller_of(request)
        published = await offer.names.resolve(body.model, caller.tenant)
        async with within(timeout_of(caller, body.timeout, streams=False)):
            values, done = await _scores(offer, body, published, caller.tenant)
        data = [
            {"index": index, "object": "score", "score": value}
            for index, value in enumerate(values)
        ]
        answer = {**head("score"), "data": data, **told(offer, body.model, done)}
        return json_response(answer, adapter_header(done.published))

    return router


async def _scores(
    offer: Offer, body: ScoreBody, published: Published | None, tenant: str
) -> tuple[list[float], Embeddings | Classifications]:
    """Returns the scores of all pairs, and what they were computed from."""
    pairs, priority = body.pairs(), body.priority or 0
    reading, adapter = offer.services.reading, published or ""
    config = None if published is None else published.summary.config.head
    if config is not None:
        place = _place_of_score(config)
        inputs = [TextPair(first, second) for first, second in pairs]
        classes = await reading.classify(inputs, adapter, tenant, priority)
        return [row[place] for row in classes.scores], classes
    texts = [text for pair in pairs for text in pair]
    vectors = await reading.embed(texts, adapter, None, True, tenant, priority)
    values = [
        _cosine(vectors.vectors[index], vectors.vectors[index + 1])
        for index in range(0, len(texts), 2)
    ]
    return values, vectors


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
