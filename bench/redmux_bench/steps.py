"""Steps of the engine, driven by hand: decodes at a context of choice, and a chunked prefill."""

import time
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from redmux import InvalidArgumentError
from redmux_adapters import Adapter
from redmux_server.engine.bank import AdapterBank
from redmux_server.engine.blocks import BlockPool
from redmux_server.engine.request import Event, Request, SamplingParams, Work
from redmux_server.engine.sampling import sample
from redmux_server.engine.stepper import Runner
from redmux_server.models.base_model import BaseModel


def greedy_request(
    prompt_ids: Sequence[int],
    max_tokens: int,
    adapter: Adapter | None = None,
    sink: Callable[[Event], None] = lambda event: None,
) -> Request:
    """Returns a request that draws the likeliest tokens, as many as it may."""
    return Request(
        prompt_ids=list(prompt_ids), max_tokens=max_tokens, sampling=SamplingParams(),
        stop_token_ids=frozenset(), tenant="", adapter=adapter, logprobs=False, sink=sink,
    )  # fmt: skip


class Stepper:
    """A runner with its cache and bank in the place of the scheduler, on the thread of the caller.

    A request holds its blocks and its slot from `request` to `release`.
    """

    def __init__(self, runner: Runner, bank: AdapterBank, num_blocks: int, block_size: int) -> None:
        self.runner = runner
        self.bank = bank
        self._pool = BlockPool(num_blocks, block_size)

    def request(
        self, prompt_ids: Sequence[int], max_tokens: int, adapter: Adapter | None = None
    ) -> Request:
        """Returns a request that can run; InvalidArgumentError where the cache has no room."""
        request = greedy_request(prompt_ids, max_tokens, adapter)
        blocks = self._pool.allocate(request.max_length)
        if blocks is None:
            raise InvalidArgumentError(f"the cache has no room for {request.max_length} tokens")
        request.blocks = blocks
        if adapter is not None:
            request.slot = self.bank.acquire(adapter.digest, adapter.edits)
        return request

    def release(self, requests: Sequence[Request]) -> None:
        """Gives blocks and slots back."""
        for request in requests:
            self._pool.release(request.blocks)
            if request.adapter is not None and request.slot is not None:
                self.bank.release(request.slot)

    def step(self, work: Sequence[tuple[Request, int]], runner: Runner | None = None) -> Tensor:
        """Computes a step, by another runner if given, and counts its tokens as done."""
        logits = (runner or self.runner).forward([Work(r, count) for r, count in work])
        for request, count in work:
            request.num_computed += count
        return logits


class TimedSteps(Stepper):
    """Times steps of a loaded model.

    Row i of every batch has the same cache blocks; its context is filled as far as it was asked
    for, so that a decode reads keys and values that were really written.
    """

    def __init__(self, model: BaseModel, chunk: int, seed: int) -> None:
        """`chunk` is the most tokens of one prefill step."""
        super().__init__(model.runner, model.bank, model.num_blocks, model.block_size)
        self._chunk = chunk
        self._vocab_size = model.vocab_size
        self._rng = np.random.default_rng(seed)
        self._rows: list[Request] = []
        model.runner.enter_thread()

    def fill(self, context: int) -> None:
        """Adds a row and computes its keys and values for positions 0 to context - 1."""
        self._rows.append(self.request(self._prompt(context), 1))
        self._prefill(self._rows[-1])

    def decode_s(self, batch: int, context: int, adapters: Sequence[Adapter]) -> float:
        """Returns the seconds of one greedy step of the first `batch` rows at this context.

        Row i uses adapter i, the base model where there are none. Every call computes the same
        position.
        """
        slots = [self.bank.acquire(adapter.digest, adapter.edits) for adapter in adapters]
        work = []
        for i, row in enumerate(self._rows[:batch]):
            request = greedy_request(row.prompt_ids[:context], 1, adapters[i] if slots else None)
            request.token_ids.append(row.prompt_ids[0])
            request.num_computed = context
            request.blocks = row.blocks[: self._pool.blocks_for(request.max_length)]
            request.slot = slots[i] if slots else None
            work.append((request, 1))
        try:
            return self._timed(work)
        finally:
            for slot in slots:
                self.bank.release(slot)

    def prefill_s(self, num_tokens: int, adapter: Adapter | None) -> float:
        """Returns the seconds from nothing to the first token of a prompt, chunk by chunk."""
        request = self.request(self._prompt(num_tokens), 1, adapter)
        try:
            return self._prefill(request)
        finally:
            self.release([request])

    def _prefill(self, request: Request) -> float:
        elapsed_s = 0.0
        while left := len(request.prompt_ids) - request.num_computed:
            elapsed_s += self._timed([(request, min(self._chunk, left))])
        return elapsed_s

    def _timed(self, work: Sequence[tuple[Request, int]]) -> float:
        """Returns the seconds of a step with the drawing of its tokens."""
        sampled = [request for request, count in work if Work(request, count).samples]
        started_s = time.perf_counter()
        sample(self.step(work), sampled)
        return time.perf_counter() - started_s

    def _prompt(self, num_tokens: int) -> list[int]:
        ids: list[int] = self._rng.integers(self._vocab_size, size=num_tokens).tolist()
        return ids
