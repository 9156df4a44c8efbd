"""What completions, chats and responses share: accepted generations, read together."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from starlette.requests import Request

from redmux_server.engine.request import FinishReason
from redmux_server.http_api.gate import Caller
from redmux_server.http_api.offer import Offer, applied
from redmux_server.services.choice import Delta, Finish
from redmux_server.services.generation import Generation, generates_nothing
from redmux_server.services.pinning import Pinned
from redmux_server.services.spec import GenerationSpec

_REASONS = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}
_READ_TIMEOUT = b"x-stainless-read-timeout"
_LONGEST_S = 1e6


def caller_of(request: Request) -> Caller:
    """Returns who sent a request."""
    caller: Caller = request.scope["caller"]
    return caller


def timeout_of(caller: Caller, given_s: float | None, streams: bool) -> float | None:
    """Returns the seconds that an answer may take: what the body says, or the client.

    The openai package tells how long it waits for something to read, which is the whole answer
    only where that is not streamed.
    """
    if given_s is not None or streams:
        return given_s
    with contextlib.suppress(ValueError):
        limit_s = float(caller.headers.get(_READ_TIMEOUT, b""))
        if 0 < limit_s < _LONGEST_S:
            return limit_s
    return None


async def submit(
    offer: Offer, specs: Sequence[GenerationSpec], caller: Caller
) -> tuple[list[Generation], Pinned | None]:
    """Returns the accepted generations, all or none, and the adapter that they are pinned to.

    Raises a RedmuxError for whatever cannot be served.
    """
    service = offer.services.generation
    if service is None:
        raise generates_nothing()
    generations: list[Generation] = []
    published = None
    try:
        for spec in specs:
            generation, published = await service.submit(spec, caller.tenant)
            generations.append(generation)
    except BaseException:
        for generation in generations:
            generation.cancel()
        raise
    return generations, published


async def read(generations: Sequence[Generation]) -> AsyncGenerator[tuple[int, Delta]]:
    """Yields the deltas of all, each beside the index of its generation, as they come.

    Raises the first error, which cancels all of them, as closing does.
    """
    try:
        if len(generations) == 1:
            async with contextlib.aclosing(generations[0].deltas()) as deltas:
                async for delta in deltas:
                    yield 0, delta
            return
        async with contextlib.aclosing(_read_many(generations)) as several:
            async for pair in several:
                yield pair
    finally:
        for generation in generations:
            generation.cancel()


async def _read_many(generations: Sequence[Generation]) -> AsyncGenerator[tuple[int, Delta]]:
    ready: asyncio.Queue[tuple[int, Delta] | Exception | None] = asyncio.Queue()

    async def read_one(index: int) -> None:
        try:
            async for delta in generations[index].deltas():
                ready.put_nowait((index, delta))
            ready.put_nowait(None)
        except Exception as err:
            ready.put_nowait(err)

    tasks = [asyncio.create_task(read_one(index)) for index in range(len(generations))]
    try:
        num_open = len(tasks)
        while num_open:
            item = await ready.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_open -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def complete(generations: Sequence[Generation], num_choices: int) -> list[Delta]:
    """Returns all choices of all generations in their order."""
    wholes = [Delta() for _ in range(len(generations) * num_choices)]
    async with contextlib.aclosing(read(generations)) as deltas:
        async for index, delta in deltas:
            wholes[index * num_choices + delta.index].add(delta)
    return wholes


class Used:
    """The tokens that an answer has taken, counted from its finishes."""

    def __init__(self) -> None:
        self._prompts: dict[int, Finish] = {}  # one finish of each prompt
        self._num_completion = 0

    def add(self, prompt_index: int, finish: Finish) -> None:
        """Counts one choice; a prompt counts once, however many choices it has."""
        self._prompts.setdefault(prompt_index, finish)
        self._num_completion += finish.num_completion_tokens

    def told(self) -> dict[str, Any]:
        """Returns the usage in OpenAI's shape."""
        finishes = self._prompts.values()
        return usage(
            sum(finish.num_prompt_tokens for finish in finishes),
            self._num_completion,
            sum(finish.num_cached_tokens for finish in finishes),
        )


def usage(num_prompt: int, num_completion: int, num_cached: int) -> dict[str, Any]:
    """Returns counts of tokens in OpenAI's shape."""
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": num_prompt + num_completion,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }


def reason_of(finish: Finish) -> str:
    """Returns the finish reason as OpenAI calls it."""
    return _REASONS[finish.reason]


def stop_of(finish: Finish) -> str | int | None:
    """Returns what ended a choice: a stop text, a token, or None."""
    return finish.stop or finish.stop_token_id


def told_of(published: Pinned | None, finish: Finish) -> dict[str, Any]:
    """Returns what an answer tells under `redmux` once it is complete."""
    return dict(applied(
        published, first_token_s=finish.first_token_s, total_s=finish.total_s,
        added_special_tokens=finish.num_added_tokens,
    ))  # fmt: skip
