"""The engine of a server, in this process."""

import asyncio
import itertools
from collections.abc import Sequence

from redmux_bench.steps import greedy_request
from redmux_bench.workload import Planned
from redmux_server.config import ServerConfig
from redmux_server.device import choose
from redmux_server.engine.grammar import Matcher
from redmux_server.engine.request import Event, Failed, Request, Token
from redmux_server.metrics import Metrics
from redmux_server.models.base_model import BaseModel
from redmux_server.models.load_causal import load_causal
from redmux_server.wiring import make_engine


class LoneEngine:
    """An engine in this process, with nothing between the caller and its events."""

    def __init__(self, config: ServerConfig, model: BaseModel | None = None) -> None:
        """`model` is one that another engine has, where only one of them runs at a time.

        What is left in its cache must not be used again then.
        """
        self.model = model or load_causal(config, choose(config))
        self.vocab_size = self.model.vocab_size
        self.engine = make_engine(config, self.model, Metrics())

    async def run(self, planned: Sequence[Planned], matchers: Sequence[Matcher] = ()) -> int:
        """Submits all requests at once; returns their tokens once all have ended.

        Every second one takes one of the matchers, in turn, and what it may write follows its
        grammar. Raises the error of a request that fails.
        """
        turn = itertools.cycle(matchers)
        requests = [greedy_request(one.prompt_ids, one.output_tokens) for one in planned]
        if matchers:
            for request in requests[1::2]:
                request.matcher = next(turn).copy()
        answers = await self.answer(requests, len(requests))
        return sum(map(len, answers))

    async def answer(self, requests: Sequence[Request], concurrency: int) -> list[list[Token]]:
        """Returns the tokens of each request, so many of which are open at a time.

        Raises the error of one that fails.
        """
        places = asyncio.Semaphore(concurrency)

        async def one(request: Request) -> list[Token]:
            tokens: list[Token] = []
            ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

            def take(event: Event) -> None:
                if isinstance(event, Token):
                    tokens.append(event)
                elif isinstance(event, Failed):
                    ended.set_exception(event.error)
                else:
                    ended.set_result(None)

            request.sink = take
            async with places:
                self.engine.submit(request)
                await ended
            return tokens

        return await asyncio.gather(*map(one, requests))
