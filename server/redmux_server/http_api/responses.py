"""/v1/responses: an answer to a conversation that is sent whole; nothing is kept."""

import secrets
import time
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from redmux_server.engine.request import FinishReason
from redmux_server.http_api.answers import json_response
from redmux_server.http_api.deadline import within
from redmux_server.http_api.generating import (
    caller_of,
    complete,
    read,
    submit,
    timeout_of,
    told_of,
)
from redmux_server.http_api.logprobs import TokenNames, chat_logprobs
from redmux_server.http_api.offer import Offer, adapter_header, applied
from redmux_server.http_api.schemas.answers import EVENTS, ResponseObject
from redmux_server.http_api.schemas.response import ResponseBody
from redmux_server.http_api.sse import EventStream
from redmux_server.http_api.validated import JsonRoute
from redmux_server.services.choice import Delta
from redmux_server.services.generation import Generation
from redmux_server.services.pinning import Pinned


def router(offer: Offer) -> APIRouter:
    """Returns the routes of responses."""
    router = APIRouter(route_class=JsonRoute, tags=["generation"])

    @router.post("/v1/responses", response_model=ResponseObject, responses=EVENTS)
    async def create_response(request: Request, body: ResponseBody) -> Response:
        """Returns the assistant's answer."""
        caller = caller_of(request)
        adapter = await offer.names.wanted(body.model, body.mix, caller.tenant)
        timeout_s = timeout_of(caller, body.timeout, body.stream)
        spec = body.spec(adapter, timeout_s)
        async with within(timeout_s):
            (generation,), published = await submit(offer, [spec], caller)
            answer = _Answer(offer, body, generation, published)
            headers = adapter_header(published)
            if body.stream:
                return EventStream(answer.events(), headers, timeout_s)
            return json_response(await answer.whole(), headers)

    return router


class _Answer:
    """The answer to one request, whole or as events."""

    def __init__(
        self, offer: Offer, body: ResponseBody, generation: Generation, published: Pinned | None
    ) -> None:
        self._offer = offer
        self._body = body
        self._generation = generation
        self._published = published
        self._names = TokenNames(offer.codec.tokens, as_ids=False)
        self._created_s = int(time.time())
        self._id = f"resp_{secrets.token_hex(16)}"
        self._item_id = f"msg_{secrets.token_hex(16)}"
        self._num_events = 0

    async def whole(self) -> dict[str, Any]:
        """Returns the complete answer."""
        (whole,) = await complete([self._generation], 1)
        return self._response(whole)

    def _response(self, whole: Delta | None) -> dict[str, Any]:
        """Returns the response as it is with this answer, None where it has just begun."""
        body = self._body
        finish = None if whole is None else whole.finish
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created_s,
            "status": "in_progress" if whole is None else _status(whole),
            "background": False,
            "error": None,
            "incomplete_details": (
                {"reason": "max_output_tokens"} if whole and _is_cut(whole) else None
            ),
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": body.model,
            "output": [] if whole is None else [self._item(whole)],
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": False,
            "temperature": body.temperature,
            "text": {"format": body.text.format.model_dump(by_alias=True, exclude_none=True)},
            "tool_choice": "auto",
            "tools": [],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": None if whole is None else _usage(whole),
            "metadata": {},
            "system_fingerprint": self._offer.fingerprint,
            "redmux": (
                applied(self._published) if finish is None else told_of(self._published, finish)
            ),
        }

    def _item(self, whole: Delta | None) -> dict[str, Any]:
        return {
            "id": self._item_id,
            "type": "message",
            "status": "in_progress" if whole is None else _status(whole),
            "role": "assistant",
            "content": [] if whole is None else [self._part(whole)],
        }

    def _part(self, whole: Delta | None) -> dict[str, Any]:
        return {
            "type": "output_text",
            "text": "" if whole is None else whole.text,
            "annotations": [],
            "logprobs": [] if whole is None else self._logprobs(whole),
        }

    def _logprobs(self, part: Delta) -> list[dict[str, Any]]:
        if not self._body.tells_logprobs:
            return []
        told: list[dict[str, Any]] = chat_logprobs(
            self._names, part.token_ids, part.logprobs, part.top_logprobs,
            self._body.top_logprobs or 0,
        )["content"]  # fmt: skip
        return told

    async def events(self) -> AsyncGenerator[bytes]:
        """Yields the events of the answer, all that are ready at a time."""
        place = {"item_id": self._item_id, "output_index": 0, "content_index": 0}
        item_place = {"output_index": 0}
        yield (
            self._event("response.created", response=self._response(None))
            + self._event("response.in_progress", response=self._response(None))
            + self._event("response.output_item.added", **item_place, item=self._item(None))
            + self._event("response.content_part.added", **place, part=self._part(None))
        )
        whole = Delta()
        async for _, delta in read([self._generation]):
            whole.add(delta)
            if delta.text or (self._body.tells_logprobs and delta.token_ids):
                yield self._event(
                    "response.output_text.delta", **place, delta=delta.text,
                    logprobs=self._logprobs(delta),
                )  # fmt: skip
        last = "response.incomplete" if _is_cut(whole) else "response.completed"
        yield (
            self._event(
                "response.output_text.done", **place, text=whole.text,
                logprobs=self._logprobs(whole),
            )
            + self._event("response.content_part.done", **place, part=self._part(whole))
            + self._event("response.output_item.done", **item_place, item=self._item(whole))
            + self._event(last, response=self._response(whole))
        )  # fmt: skip

    def _event(self, kind: str, **fields: Any) -> bytes:
        number, self._num_events = self._num_events, self._num_events + 1
        data = {"type": kind, "sequence_number": number, **fields}
        return b"event: %s\ndata: %s\n\n" % (kind.encode(), msgspec.json.encode(data))


def _is_cut(whole: Delta) -> bool:
    return whole.finish is not None and whole.finish.reason is FinishReason.LENGTH


def _status(whole: Delta) -> str:
    return "incomplete" if _is_cut(whole) else "completed"


def _usage(whole: Delta) -> dict[str, Any]:
    finish = whole.finish
    assert finish is not None
    return {
        "input_tokens": finish.num_prompt_tokens,
        "input_tokens_details": {"cached_tokens": finish.num_cached_tokens},
        "output_tokens": finish.num_completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": finish.num_prompt_tokens + finish.num_completion_tokens,
    }
