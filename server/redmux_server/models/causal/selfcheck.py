"""Prove at start that the packed, paged engine computes what the plain model computes."""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from redmux.errors import FailedPreconditionError
from redmux_adapters import Adapter
from redmux_server.engine.bank import AdapterBank
from redmux_server.engine.blocks import BlockPool
from redmux_server.engine.request import Request, SamplingParams, Work
from redmux_server.models.causal.context_limit import longest_alike
from redmux_server.models.causal.runner import CachedRunner
from redmux_server.models.kvcache import BLOCK
from redmux_server.models.proving import random_edits, relative_error

logger = logging.getLogger(__name__)

# Together long enough for torch, and for our own products, to split rows over threads.
_LENGTHS = (5, 13, 90, 21, 2)
_CHUNKS = (3, 7, 31, 15, 2)  # tokens of each at a time, where their steps are mixed
# Further mixes: how many requests decode, the prompts in any order and over and over, and what ends
# of prompts (which, how many tokens) are computed beside them. Their rows fill tiles of 6 and of 8
# once, twice and more, and leave some over.
_MIXES = ((7, ((1, 4),)), (13, ()), (17, ((3, 9), (0, 1))))
_MAX_TOKENS = 2
_NUM_READ = 3  # prompts whose hidden states are compared
MAX_RUNNING = len(_LENGTHS)
MAX_CONTEXT = max(_LENGTHS) + _MAX_TOKENS
_NEXT_TOKEN = 7


def min_cache_tokens(block_size: int) -> int:
    """Returns how many cache tokens the check needs: every prompt in blocks of its own."""
    return sum(-(-(n + _MAX_TOKENS) // block_size) * block_size for n in _LENGTHS)


MIN_CACHE_TOKENS = min_cache_tokens(BLOCK)
# Largest difference to plain attention, relative to the largest logit.
# In bf16 transformers' own modules came to 0.06 with 32 layers and random weights, for the order
# of sums alone.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.15, torch.float16: 2e-2}
# The same where weights and activations are rounded for products: three times what SmolLM2 shows.
# Unrelated logits differ by more than 1.
ROUNDED_TOLERANCE = {"bf16": 0.1, "int8": 0.3, "int4": 0.5}


@dataclass(frozen=True, slots=True)
class Reference:
    """Last-token logits [vocab] of the check's prompts, from the unchanged model.

    `next_logits` are those after one more token, which is `_NEXT_TOKEN`.
    """

    prompts: Sequence[list[int]]
    logits: Sequence[Tensor]
    next_logits: Sequence[Tensor]


@torch.inference_mode()
def reference(model: Any) -> Reference:
    """Runs the prompts through the model as transformers loaded it."""
    generator = torch.Generator().manual_seed(0)
    vocab = model.get_input_embeddings().weight.shape[0]
    longest = longest_alike(model.config) - _MAX_TOKENS
    lengths = [min(n, longest) for n in _LENGTHS]
    prompts = [torch.randint(vocab, (n,), generator=generator).tolist() for n in lengths]
    # A pass over few tokens is mostly reading the weights, so all prompts but the longest share
    # one: padding behind a prompt changes nothing in it.
    long = lengths.index(max(lengths))
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for batch in ([long], [i for i in range(len(prompts)) if i != long]):
        width = max(lengths[i] for i in batch) + 1
        ids = [prompts[i] + [_NEXT_TOKEN] * (width - lengths[i]) for i in batch]
        ends = sorted({n for i in batch for n in (lengths[i] - 1, lengths[i])})
        rows = model(
            input_ids=torch.tensor(ids, device=model.device),
            use_cache=False,
            logits_to_keep=torch.tensor(ends, device=model.device),
        ).logits
        for i, row in zip(batch, rows, strict=True):
            at = ends.index(lengths[i] - 1)
            found[i] = row[at], row[at + 1]
    logits, next_logits = zip(*(found[i] for i in range(len(prompts))), strict=True)
    return Reference(prompts, logits, next_logits)


class SelfCheck:
    """Runs the reference's prompts through the engine's own path, alone and mixed."""

    def __init__(
        self,
        make_runner: Callable[[AdapterBank], CachedRunner],
        sites: Mapping[str, int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """`sites` are the modules that the check's random adapters edit.

        `make_runner` makes what is checked, for at most `MAX_RUNNING` requests of `MAX_CONTEXT`
        tokens.
        """
        self._bank = AdapterBank(sites, device=device, dtype=dtype, max_bytes=0, min_slots=8)
        self._runner = make_runner(self._bank)
        self._runner.enter_thread()
        cache = self._runner.cache
        self._pool = BlockPool(cache.num_blocks, cache.block_size)
        self._adapters = [None, *(_random_adapter(sites, seed) for seed in range(1, 4))]
        self._dtype = dtype

    def close(self) -> None:
        """Makes the model forget the check's adapters."""
        self._runner.forget_sites()

    def compare(self, expected: Reference, tolerance: float | None = None) -> float:
        """Returns the largest difference of packed steps to plain attention.

        One step of all prompts, then one that decodes a token for each of them. It is relative to
        the largest logit. Raises FailedPreconditionError unless it is below `tolerance`, by
        default that of equal weights in the model's dtype.
        """
        tolerance = tolerance or TOLERANCE[self._dtype]
        largest = 0.0
        requests = [self._request(p, None) for p in expected.prompts]
        got = [*self._step([(r, len(r.prompt_ids)) for r in requests])]
        for request in requests:
            request.token_ids.append(_NEXT_TOKEN)
        got += self._step([(r, 1) for r in requests])
        self._release(requests)
        for row, want in zip(got, [*expected.logits, *expected.next_logits], strict=True):
            error = relative_error(row, want)
            largest = max(largest, error)
            if not error < tolerance:
                raise FailedPreconditionError(
                    f"the packed engine differs from the plain model by {error:.1e} relative to "
                    f"the largest logit (allowed: {tolerance:g}): this architecture cannot be "
                    f"served"
                )
        return largest

    def is_bit_identical(self, prompts: Sequence[list[int]]) -> bool:
        """Whether logits have the same bits alone and mixed.

        Whatever the chunks and neighbours, their order and number.
        """
        alone = []
        for i, prompt in enumerate(prompts):
            request = self._request(prompt, self._adapters[i % 4])
            rows = [*self._step([(request, len(prompt))])]
            request.token_ids.append(_NEXT_TOKEN)
            rows.append(self._step([(request, 1)])[0])
            alone.append(torch.stack(rows))
            self._release([request])
        requests = [self._request(p, self._adapters[i % 4]) for i, p in enumerate(prompts)]
        mixed: list[list[Tensor]] = [[] for _ in requests]
        while any(len(rows) < 2 for rows in mixed):
            plan = []
            for i, r in enumerate(requests):
                if len(mixed[i]) == 1 and len(r.token_ids) == len(r.prompt_ids):
                    r.token_ids.append(_NEXT_TOKEN)
                left = len(r.token_ids) - r.num_computed
                if left:
                    plan.append((r, min(left, _CHUNKS[i])))
            plan.sort(key=lambda item: item[1] > 1 or not item[0].is_decoding)
            ends = [r for r, n in plan if r.num_computed + n == len(r.token_ids)]
            for r, row in zip(ends, self._step(plan), strict=True):
                mixed[requests.index(r)].append(row)
        is_identical = all(
            torch.equal(a, torch.stack(m)) for a, m in zip(alone, mixed, strict=True)
        ) and self._mixes_alike(requests, alone)
        self._release(requests)
        return is_identical and self._reads_alike(prompts)

    def _mixes_alike(self, requests: Sequence[Request], alone: Sequence[Tensor]) -> bool:
        """Whether tokens that were computed before have the same bits `alone` in all `_MIXES`.

        `alone` are the logits [2, vocab] behind the prompt and behind the token after it. What
        several rows write for one request's token is the same, so they share its blocks.
        """
        generator = torch.Generator().manual_seed(0)
        for count, ends in _MIXES:
            order = torch.randint(len(requests), (count,), generator=generator).tolist()
            works = [_again(requests[i], 1, generated=1) for i in order]
            works += [_again(requests[i], n) for i, n in ends]
            rows = self._runner.forward(works)
            want = [*(alone[i][1] for i in order), *(alone[i][0] for i, _ in ends)]
            if not torch.equal(rows, torch.stack(want)):
                return False
        return True

    def _reads_alike(self, prompts: Sequence[list[int]]) -> bool:
        """Whether hidden states, which vectors are made of, have the same bits alone and mixed.

        Of the short prompts, in another order than the logits.
        """

        def read(order: Sequence[int]) -> list[Tensor]:
            requests = [self._request(prompts[i], self._adapters[i % 4]) for i in order]
            states = self._runner.hidden([Work(r, len(r.prompt_ids)) for r in requests])
            self._release(requests)
            return [*states]

        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))[:_NUM_READ]
        together = read(order)
        return all(torch.equal(read([i])[0], row) for i, row in zip(order, together, strict=True))

    def _request(self, prompt: list[int], adapter: Adapter | None) -> Request:
        request = Request(
            prompt_ids=prompt, max_tokens=_MAX_TOKENS, sampling=SamplingParams(),
            stop_token_ids=frozenset(), tenant="", adapter=adapter, logprobs=False,
            sink=lambda event: None,
        )  # fmt: skip
        blocks = self._pool.allocate(request.max_length)
        if blocks is None:
            raise FailedPreconditionError(
                f"kv_cache_tokens is too small: the start-up check needs "
                f"{min_cache_tokens(self._pool.block_size)}"
            )
        request.blocks = blocks
        if adapter is not None:
            request.slot = self._bank.acquire(adapter.digest, adapter.edits)
        return request

    def _release(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self._pool.release(request.blocks)
            if request.slot is not None:
                self._bank.release(request.slot)

    def _step(self, plan: Sequence[tuple[Request, int]]) -> Tensor:
        logits = self._runner.forward([Work(r, n) for r, n in plan])
        for request, count in plan:
            request.num_computed += count
        return logits


def _again(request: Request, count: int, generated: int = 0) -> Work:
    """Returns the work of computing tokens anew: the last `count` until so many are generated."""
    known = dataclasses.replace(request)
    known.token_ids = request.token_ids[: len(request.prompt_ids) + generated]
    known.num_computed = max(0, len(known.token_ids) - count)
    return Work(known, len(known.token_ids) - known.num_computed)


def _random_adapter(sites: Mapping[str, int], seed: int) -> Adapter:
    return Adapter(base_fingerprint="self-check", edits=random_edits(sites, seed))
