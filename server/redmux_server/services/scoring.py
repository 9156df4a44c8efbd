"""ScoringService: how likely given continuations of a prompt are, below every protocol."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from redmux.errors import InvalidArgumentError, RedmuxError, RequestCancelledError
from redmux_server.engine.engine import Engine
from redmux_server.engine.request import Event, Failed, Finished, Request, SamplingParams, Scored
from redmux_server.metrics import Metrics
from redmux_server.services.generation import GenerationService, Prepared
from redmux_server.services.inbox import Inbox
from redmux_server.services.pinning import Pinned
from redmux_server.services.spec import ScoreSpec
from redmux_server.services.validation import Validator

_AT_ONCE = 32  # continuations of one call that are open at the same time


@dataclass(slots=True)
class TokenScores:
    """Tokens, and of each its log-probability and whether it is the likeliest."""

    token_ids: list[int]
    logprobs: list[float] = field(default_factory=list)
    is_greedy: list[bool] = field(default_factory=list)

    def cut(self, start: int, stop: int | None = None) -> "TokenScores":
        """Returns a part of them."""
        part = slice(start, stop)
        return TokenScores(self.token_ids[part], self.logprobs[part], self.is_greedy[part])


@dataclass(frozen=True, slots=True)
class Scores:
    """What a prompt's continuations, and the prompt if that was asked for, came to."""

    continuations: Sequence[TokenScores]
    prompt: TokenScores | None
    num_prompt_tokens: int
    num_cached_tokens: int  # of the prompt, found in the cache by the first continuation
    num_added_tokens: int  # of the prompt, special tokens that the server put there
    published: Pinned | None


class ScoringService:
    """Resolves, validates and tokenizes like generation does; each continuation is a request."""

    def __init__(
        self, engine: Engine, service: GenerationService, validator: Validator, metrics: Metrics
    ) -> None:
        """`service` prepares the prompts."""
        self._engine = engine
        self._service = service
        self._validator = validator
        self._metrics = metrics

    async def score(self, spec: ScoreSpec, tenant: str) -> Scores:
        """Returns the scores of a prompt's continuations.

        Raises a RedmuxError for what cannot be served; cancelling it cancels its requests.
        `tenant` is who the scheduler charges; empty charges the adapter.
        """
        try:
            if self._service.decoder_start is not None and spec.prompt_logprobs:
                raise InvalidArgumentError(
                    "the encoder of the model reads the prompt, so it has no log-probabilities; "
                    "ask for those of continuations"
                )
            self._validator.continuations(spec)
            prepared = await self._service.prepare(spec, tenant)
            tenant = tenant or (prepared.published.name if prepared.published else "")
            self._validator.scored_prompt(len(prepared.ids))
            continuations = await self._encode(spec, prepared.ids, tenant)
            self._validator.scored(len(prepared.ids), continuations)
        except RedmuxError as err:
            self._metrics.refused(err.status.name.lower())
            raise
        return await self._run(spec, prepared, continuations, tenant)

    async def _encode(self, spec: ScoreSpec, prompt_ids: list[int], tenant: str) -> list[list[int]]:
        texts = [given for given in spec.continuations if isinstance(given, str)]
        encoded = iter(
            await self._service.encode_continuations(spec.prompt, prompt_ids, texts, tenant)
        )
        return [
            next(encoded) if isinstance(given, str) else list(given) for given in spec.continuations
        ]

    async def _run(
        self, spec: ScoreSpec, prepared: Prepared, continuations: list[list[int]], tenant: str
    ) -> Scores:
        num_prompt = len(prepared.ids)
        first = continuations[0] if continuations else []
        from_prompt = num_prompt - 1 if spec.prompt_logprobs else 0
        # The first one leaves the prompt in the cache, where the others find it.
        request, scores = await self._one(prepared, first, from_prompt + len(first), tenant)
        found = [scores.cut(from_prompt)] if continuations else []
        places = asyncio.Semaphore(max(1, min(_AT_ONCE, self._engine.most_for_one // 2)))

        async def in_turn(ids: list[int]) -> TokenScores:
            async with places:
                return (await self._one(prepared, ids, len(ids), tenant, waits=True))[1]

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(in_turn(ids)) for ids in continuations[1:]]
        except ExceptionGroup as group_error:  # the first to fail has cancelled the others
            raise group_error.exceptions[0] from None
        found += [task.result() for task in tasks]
        prompt = scores.cut(0, from_prompt) if spec.prompt_logprobs else None
        num_cached = min(request.num_cached, num_prompt)
        num_added = prepared.num_added
        return Scores(found, prompt, num_prompt, num_cached, num_added, prepared.published)

    async def _one(
        self,
        prepared: Prepared,
        continuation: list[int],
        num_scored: int,
        tenant: str,
        *,
        waits: bool = False,
    ) -> tuple[Request, TokenScores]:
        """Scores the last `num_scored` tokens of prompt and continuation, in a request of its own.

        What is behind the last of them is not computed. `waits` is for a place where none is free.
        """
        start = self._service.decoder_start
        ids = [*(prepared.ids if start is None else [start]), *continuation]
        events: Inbox[Event] = Inbox()
        scores = TokenScores(ids[-num_scored:])
        request = Request(
            prompt_ids=ids[:-1], source_ids=() if start is None else prepared.ids, max_tokens=0,
            sampling=SamplingParams(), stop_token_ids=frozenset(), tenant=tenant,
            adapter=prepared.adapter, logprobs=True, sink=events.put, targets=scores.token_ids,
            edited=prepared.edited, owner=prepared.owner,
        )  # fmt: skip
        if waits:
            await self._engine.submit_in_turn(request)
        else:
            self._engine.submit(request)
        try:
            while True:
                for event in await events.take():
                    if isinstance(event, Failed):
                        raise event.error
                    if isinstance(event, Finished):
                        return request, scores
                    assert isinstance(event, Scored)
                    scores.logprobs += event.logprobs
                    scores.is_greedy += event.is_greedy
        finally:
            self._engine.end(request, Failed(RequestCancelledError("the request was cancelled")))
