"""/v1/chat/completions."""

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from redmux_server.http_api.answers import json_response
from redmux_server.http_api.deadline import within
from redmux_server.http_api.generating import (
    Used,
    caller_of,
    complete,
    read,
    reason_of,
    stop_of,
    submit,
    timeout_of,
    told_of,
)
from redmux_server.http_api.logprobs import TokenNames, chat_logprobs
from redmux_server.http_api.offer import Offer, adapter_header, applied
from redmux_server.http_api.schemas.answers import EVENTS, ChatCompletion
from redmux_server.http_api.schemas.chat import ChatBody
from redmux_server.http_api.sse import Chunks, EventStream
from redmux_server.http_api.validated import JsonRoute
from redmux_server.services.choice import Delta, Finish
from redmux_server.services.generation import Generation
from redmux_server.services.pinning import Pinned
from redmux_server.services.tools import ToolCallDelta, ToolCallParser, whole_calls


def router(offer: Offer) -> APIRouter:
    """Returns the routes of chats."""
    router = APIRouter(route_class=JsonRoute, tags=["generation"])

    @router.post("/v1/chat/completions", response_model=ChatCompletion, responses=EVENTS)
    async def create_chat_completion(request: Request, body: ChatBody) -> Response:
        """Returns the assistant's next message."""
        caller = caller_of(request)
        adapter = await offer.names.wanted(body.model, body.mix, caller.tenant)
        timeout_s = timeout_of(caller, body.timeout, body.stream)
        spec = body.spec(body.chat(), adapter, timeout_s, **body.outputs())
        async with within(timeout_s):
            (generation,), published = await submit(offer, [spec], caller)
            answer = _Answer(offer, body, generation, published)
            headers = adapter_header(published)
            if body.stream:
                return EventStream(answer.chunks(), headers, timeout_s)
            return json_response(await answer.whole(), headers)

    return router


class _Answer:
    """The answer to one request, whole or in chunks."""

    def __init__(
        self, offer: Offer, body: ChatBody, generation: Generation, published: Pinned | None
    ) -> None:
        self._body = body
        self._generation = generation
        self._published = published
        self._num_choices = body.n or 1
        self._names = TokenNames(offer.codec.tokens, body.return_tokens_as_token_ids)
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "object": "chat.completion.chunk" if body.stream else "chat.completion",
            "created": int(time.time()),
            "model": body.model,
            "system_fingerprint": offer.fingerprint,
        }

    async def whole(self) -> dict[str, Any]:
        """Returns the complete answer."""
        wholes = await complete([self._generation], self._num_choices)
        used = Used()
        for whole in wholes:
            assert whole.finish is not None
            used.add(0, whole.finish)
        assert wholes[0].finish is not None
        answer: dict[str, Any] = {
            **self._head,
            "choices": [self._choice(index, whole) for index, whole in enumerate(wholes)],
            "usage": used.told(),
            "redmux": told_of(self._published, wholes[0].finish),
        }
        if self._body.return_token_ids:
            answer["prompt_token_ids"] = self._generation.prompt_ids
        return answer

    def _choice(self, index: int, whole: Delta) -> dict[str, Any]:
        assert whole.finish is not None
        message: dict[str, Any] = {"role": "assistant", "content": whole.text, "refusal": None}
        parser = self._generation.tool_parser()
        if parser is not None:
            text, calls = parser.push(whole.text, is_last=True)
            message["content"] = text
            if calls:
                message |= {"content": text or None, "tool_calls": _whole_calls(calls)}
        choice = {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(whole),
            "finish_reason": _reason(whole.finish, parser),
            "stop_reason": stop_of(whole.finish),
        }
        if self._body.return_token_ids:
            choice["token_ids"] = whole.token_ids
        return choice

    def _logprobs(self, part: Delta) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        return chat_logprobs(
            self._names, part.token_ids, part.logprobs, part.top_logprobs,
            self._body.top_logprobs or 0,
        )  # fmt: skip

    async def chunks(self) -> AsyncGenerator[bytes]:
        """Yields the events of the answer, all that are ready at a time."""
        body, used = self._body, Used()
        chunks = Chunks(self._head, body.stream_options)
        begin = {"role": "assistant", "content": ""}
        yield b"".join(
            chunks.of(
                {"index": index, "delta": begin, "logprobs": None, "finish_reason": None},
                redmux=applied(self._published),
            )
            for index in range(self._num_choices)
        )
        num_prompt = len(self._generation.prompt_ids)
        parsers = [self._generation.tool_parser() for _ in range(self._num_choices)]
        async for _, delta in read([self._generation]):
            finish = delta.finish
            chunks.count(delta.index, num_prompt, len(delta.token_ids))
            ready = b""
            parser = parsers[delta.index]
            said: dict[str, Any] = {"content": delta.text}
            if parser is not None:
                said = _said(*parser.push(delta.text, is_last=finish is not None))
            tells_tokens = delta.token_ids and (body.logprobs or body.return_token_ids)
            if said.get("content") or "tool_calls" in said or tells_tokens:
                choice: dict[str, Any] = {
                    "index": delta.index,
                    "delta": said,
                    "logprobs": self._logprobs(delta),
                    "finish_reason": None,
                }
                if body.return_token_ids:
                    choice["token_ids"] = delta.token_ids
                ready = chunks.of(choice)
            if finish is not None:
                used.add(0, finish)
                end = {
                    "index": delta.index, "delta": {}, "logprobs": None,
                    "finish_reason": _reason(finish, parser), "stop_reason": stop_of(finish),
                }  # fmt: skip
                ready += chunks.of(end, redmux=told_of(self._published, finish))
            if ready:
                yield ready
        yield chunks.end(used.told())


def _reason(finish: Finish, parser: ToolCallParser | None) -> str:
    """Returns the finish reason: calls where the answer ended with some by itself."""
    reason = reason_of(finish)
    return "tool_calls" if reason == "stop" and parser is not None and parser.num_calls else reason


def _whole_calls(deltas: Sequence[ToolCallDelta]) -> list[dict[str, Any]]:
    return [
        {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
        for c in whole_calls(deltas)
    ]


def _said(text: str, calls: Sequence[ToolCallDelta]) -> dict[str, Any]:
    """Returns what a chunk brings: text, parts of calls, or both."""
    said: dict[str, Any] = {"content": text} if text or not calls else {}
    if calls:
        said["tool_calls"] = [_part_of_call(call) for call in calls]
    return said


def _part_of_call(call: ToolCallDelta) -> dict[str, Any]:
    function: dict[str, Any] = {"arguments": call.arguments}
    if not call.id:
        return {"index": call.index, "function": function}
    function["name"] = call.name
    return {"index": call.index, "id": call.id, "type": "function", "function": function}
