"""Steps of the engine, driven by hand: decodes at a context of choice, and a chunked prefill."""

import time
from collections.abc import Sequence

import numpy as np

from redmux import InvalidArgumentError
from redmux_adapters import Adapter
from redmux_server.engine.blocks import BlockPool
from redmux_server.engine.request import Request, SamplingParams, Work
from redmux_server.engine.sampling import sample
from redmux_server.models.base_model import BaseModel
from redmux_server.models.kvcache import BLOCK


class Steps:
    """Runs steps of a loaded model on the thread that made this.

    Row i of every batch has the same cache blocks; its context is filled as far as it was asked
    for, so that a decode reads keys and values that were really written.
    """

    def __init__(self, model: BaseModel, chunk: int, seed: int) -> None:
        """`chunk` is the most tokens of one prefill step."""
        self._model = model
        self._chunk = chunk
        self._rng = np.random.default_rng(seed)
        self._pool = BlockPool(model.num_blocks, BLOCK)
        self._prompts: list[list[int]] = []  # of each row
        self._blocks: list[list[int]] = []
        model.runner.enter_thread()

    def fill(self, context: int) -> None:
        """Adds a row and computes its keys and values for positions 0 to context - 1.

        Raises InvalidArgumentError where the cache has no room left.
        """
        blocks = self._pool.allocate(context + 1)
        if blocks is None:
            raise InvalidArgumentError(f"the cache is too small for a context of {context} more")
        self._prompts.append(self._prompt(context))
        self._blocks.append(blocks)
        self._prefill(self._prompts[-1], blocks, None)

    def decode_s(self, batch: int, context: int, adapters: Sequence[Adapter]) -> float:
        """Returns the seconds of one greedy step of the first `batch` rows at this context.

        Row i uses adapter i, the base model where there are none. Nothing is committed: every
        call computes the same position.
        """
        num_blocks = self._pool.blocks_for(context + 1)
        work = []
        for row in range(batch):
            request = self._request(self._prompts[row][:context], self._blocks[row][:num_blocks])
            request.token_ids.append(request.prompt_ids[0])
            request.num_computed = context
            work.append(Work(request, 1))
        return self._timed(work, adapters)

    def prefill_s(self, num_tokens: int, adapter: Adapter | None) -> float:
        """Returns the seconds from nothing to the first token of a prompt, chunk by chunk."""
        blocks = self._pool.allocate(num_tokens + 1)
        assert blocks is not None, "the cache has no room for the prompt"
        try:
            return self._prefill(self._prompt(num_tokens), blocks, adapter)
        finally:
            self._pool.release(blocks)

    def _prefill(self, prompt: list[int], blocks: list[int], adapter: Adapter | None) -> float:
        request = self._request(prompt, blocks)
        adapters = [] if adapter is None else [adapter]
        elapsed_s = 0.0
        while request.num_computed < len(prompt):
            count = min(self._chunk, len(prompt) - request.num_computed)
            elapsed_s += self._timed([Work(request, count)], adapters)
            request.num_computed += count
        return elapsed_s

    def _timed(self, work: Sequence[Work], adapters: Sequence[Adapter]) -> float:
        """Returns the seconds of a step with greedy sampling; row i uses adapter i, if any."""
        bank = self._model.bank
        for item, adapter in zip(work, adapters, strict=False):
            item.request.adapter = adapter
            item.request.slot = bank.acquire(adapter.digest, adapter.edits)
        try:
            started_s = time.perf_counter()
            logits = self._model.runner.forward(work)
            sample(logits, [item.request for item in work if item.samples])
            return time.perf_counter() - started_s
        finally:
            for item in work:
                if item.request.slot is not None:
                    bank.release(item.request.slot)
                    item.request.slot = None

    def _prompt(self, num_tokens: int) -> list[int]:
        ids: list[int] = self._rng.integers(self._model.vocab_size, size=num_tokens).tolist()
        return ids

    def _request(self, prompt: list[int], blocks: list[int]) -> Request:
        return Request(
            prompt_ids=prompt, max_tokens=1, sampling=SamplingParams(),
            stop_token_ids=frozenset(), tenant="", adapter=None, logprobs=False,
            sink=lambda event: None, blocks=blocks,
        )  # fmt: skip
