"""/v1/completions."""

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
from redmux_server.http_api.logprobs import (
    CompletionLogprobs,
    TokenNames,
    joined,
    prompt_logprobs,
)
from redmux_server.http_api.offer import Offer, adapter_header
from redmux_server.http_api.schemas.answers import EVENTS, Completion
from redmux_server.http_api.schemas.completion import CompletionBody
from redmux_server.http_api.sse import Chunks, EventStream
from redmux_server.http_api.validated import JsonRoute
from redmux_server.services.choice import Delta
from redmux_server.services.generation import Generation
from redmux_server.services.pinning import Pinned

_OBJECT = "text_completion"


def router(offer: Offer) -> APIRouter:
    """Returns the routes of completions."""
    router = APIRouter(route_class=JsonRoute, tags=["generation"])

    @router.post("/v1/completions", response_model=Completion, responses=EVENTS)
    async def create_completion(request: Request, body: CompletionBody) -> Response:
        """Completes prompts."""
        caller = caller_of(request)
        adapter = await offer.names.wanted(body.model, body.mix, caller.tenant)
        outputs = {
            "logprobs": body.logprobs is not None,
            "top_logprobs": body.logprobs,
            "prompt_logprobs": _prompt_logprobs(body),
        }
        timeout_s = timeout_of(caller, body.timeout, body.stream)
        specs = [body.spec(prompt, adapter, timeout_s, **outputs) for prompt in body.prompt]
        async with within(timeout_s):
            generations, published = await submit(offer, specs, caller)
            answer = _Answer(offer, body, generations, published)
            headers = adapter_header(published)
            if body.stream:
                return EventStream(answer.chunks(), headers, timeout_s)
            return json_response(await answer.whole(), headers)

    return router


def _prompt_logprobs(body: CompletionBody) -> int | None:
    if body.echo and body.logprobs is not None:
        return max(body.logprobs, body.prompt_logprobs or 0)
    return body.prompt_logprobs


class _Answer:
    """The answer to one request, whole or in chunks."""

    def __init__(
        self, offer: Offer, body: CompletionBody, generations: Sequence[Generation],
        published: Pinned | None,
    ) -> None:  # fmt: skip
        self._offer = offer
        self._body = body
        self._generations = generations
        self._published = published
        self._num_choices = body.n or 1
        self._names = TokenNames(offer.codec.tokens, body.return_tokens_as_token_ids)
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": _OBJECT,
            "created": int(time.time()),
            "model": body.model,
            "system_fingerprint": offer.fingerprint,
        }
        num_all = len(generations) * self._num_choices
        self._logprobs = [
            CompletionLogprobs(self._names, body.logprobs or 0) for _ in range(num_all)
        ]

    async def whole(self) -> dict[str, Any]:
        """Returns the complete answer."""
        wholes = await complete(self._generations, self._num_choices)
        used = Used()
        for index, whole in enumerate(wholes):
            assert whole.finish is not None
            used.add(index // self._num_choices, whole.finish)
        assert wholes[0].finish is not None
        return {
            **self._head,
            "choices": [self._choice(index, whole) for index, whole in enumerate(wholes)],
            "usage": used.told(),
            "redmux": told_of(self._published, wholes[0].finish),
        }

    def _choice(self, index: int, whole: Delta) -> dict[str, Any]:
        body, finish = self._body, whole.finish
        generation = self._generations[index // self._num_choices]
        assert finish is not None
        parts = []
        if body.logprobs is not None:
            if body.echo:
                parts.append(self._prompt_part(index, generation))
            parts.append(
                self._logprobs[index].take(whole.token_ids, whole.logprobs, whole.top_logprobs)
            )
        choice = {
            "index": index,
            "text": self._echoed(index) + whole.text,
            "logprobs": joined(parts) if parts else None,
            "finish_reason": reason_of(finish),
            "stop_reason": stop_of(finish),
        }
        scores = generation.prompt_scores
        if body.prompt_logprobs is not None and scores is not None:
            choice["prompt_logprobs"] = prompt_logprobs(
                self._names, generation.prompt_ids, scores.logprobs, scores.top
            )
        if body.return_token_ids:
            choice["token_ids"] = whole.token_ids
            choice["prompt_token_ids"] = generation.prompt_ids
        return choice

    def _echoed(self, index: int) -> str:
        """Returns the prompt of a choice as text, if it is wanted."""
        if not self._body.echo:
            return ""
        prompt = self._body.prompt[index // self._num_choices]
        return prompt if isinstance(prompt, str) else self._offer.codec.decode(prompt)

    def _prompt_part(self, index: int, generation: Generation) -> dict[str, Any]:
        scores = generation.prompt_scores
        assert scores is not None
        return self._logprobs[index].take(generation.prompt_ids, scores.logprobs, scores.top)

    async def chunks(self) -> AsyncGenerator[bytes]:
        """Yields the events of the answer, all that are ready at a time."""
        body, used = self._body, Used()
        chunks = Chunks(self._head, body.stream_options)
        has_begun = [False] * (len(self._generations) * self._num_choices)
        async for prompt_index, delta in read(self._generations):
            index = prompt_index * self._num_choices + delta.index
            generation, finish = self._generations[prompt_index], delta.finish
            text, parts = delta.text, []
            if not has_begun[index]:
                has_begun[index] = True
                text = self._echoed(index) + text
                if body.echo and body.logprobs is not None:
                    parts.append(self._prompt_part(index, generation))
            if body.logprobs is not None:
                parts.append(
                    self._logprobs[index].take(delta.token_ids, delta.logprobs, delta.top_logprobs)
                )
            chunks.count(index, len(generation.prompt_ids), len(delta.token_ids))
            if not (text or parts or finish or body.return_token_ids):
                continue
            choice: dict[str, Any] = {
                "index": index, "text": text, "logprobs": joined(parts) if parts else None,
                "finish_reason": None,
            }  # fmt: skip
            if body.return_token_ids:
                choice["token_ids"] = delta.token_ids
            if finish is None:
                yield chunks.of(choice)
                continue
            used.add(prompt_index, finish)
            choice |= {"finish_reason": reason_of(finish), "stop_reason": stop_of(finish)}
            yield chunks.of(choice, redmux=told_of(self._published, finish))
        yield chunks.end(used.told())
