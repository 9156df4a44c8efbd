"""Prove at start that packed sequences give what the plain encoder gives, alone and mixed."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from redmux.errors import FailedPreconditionError
from redmux_adapters import Adapter, Head, HeadConfig
from redmux_adapters.format.head import KINDS
from redmux_server.device import Choices
from redmux_server.engine.bank import AdapterBank
from redmux_server.engine.reading import Reader
from redmux_server.engine.request import Pooling, Read, Reading, Request, SamplingParams, Work
from redmux_server.models.encoder.heads import Heads
from redmux_server.models.encoder.runner import EncoderRunner
from redmux_server.models.proving import random_edits, relative_error

_NUM_OWNED = 21  # rows that heads are tried on
_LENGTHS = (5, 13, 120, 21, 2)  # together long enough for torch to split work over threads
# Largest difference to the plain model, relative to the largest hidden state.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True, slots=True)
class Reference:
    """The check's prompts and their last hidden states [tokens, hidden] of the plain model."""

    prompts: Sequence[list[int]]
    states: Sequence[Tensor]


@torch.inference_mode()
def reference(model: Any, max_context: int) -> Reference:
    """Runs the prompts one by one through the model as transformers loaded it."""
    generator = torch.Generator().manual_seed(0)
    vocab = model.get_input_embeddings().num_embeddings
    prompts = [
        torch.randint(vocab, (min(n, max_context),), generator=generator).tolist() for n in _LENGTHS
    ]
    states = [
        model(input_ids=torch.tensor([prompt], device=model.device)).last_hidden_state[0]
        for prompt in prompts
    ]
    return Reference(prompts, states)


class EncoderCheck:
    """Runs the reference's prompts through the engine's own path, alone and mixed."""

    def __init__(
        self,
        make_runner: Callable[[AdapterBank], EncoderRunner],
        heads: Heads,
        sites: Mapping[str, int],
        choices: Choices,
    ) -> None:
        """`sites` are the modules that the check's random adapters edit."""
        self._bank = AdapterBank(
            sites, device=choices.device, dtype=choices.dtype, max_bytes=0,
            min_slots=len(_LENGTHS) + 1,
        )  # fmt: skip
        self._runner = make_runner(self._bank)
        self._runner.enter_thread()
        self._heads = heads
        self._reader = Reader(heads)
        self._sites = sites
        self._device, self._dtype = choices.device, choices.dtype

    def close(self) -> None:
        """Makes the model forget the check's adapters."""
        self._runner.forget_sites()

    def compare(self, expected: Reference) -> float:
        """Returns the largest difference of one packed step to the plain model.

        It is relative to the largest hidden state. Raises FailedPreconditionError if it is too
        large for equal weights in the model's dtype.
        """
        works = [self._work(prompt, None) for prompt in expected.prompts]
        largest = 0.0
        for got, want in zip(self._runner.hidden(works), expected.states, strict=True):
            error = relative_error(got, want)
            largest = max(largest, error)
            if not error < _TOLERANCE[self._dtype]:
                raise FailedPreconditionError(
                    f"packed sequences differ from the plain model by {error:.1e} relative to the "
                    f"largest hidden state (allowed: {_TOLERANCE[self._dtype]:g}): this "
                    f"architecture cannot be served"
                )
        return largest

    def is_bit_identical(self, expected: Reference, hidden_size: int) -> bool:
        """Whether what any door gives has the same bits alone and in several mixes of adapters.

        Doors are the poolings of vectors and the heads of classifiers, of every kind.
        """
        everyone = range(len(expected.prompts))
        kinds = itertools.cycle(self._heads.kinds)
        works = [
            self._work(expected.prompts[i], _random_adapter(self._sites, hidden_size, i, kind))
            for i, kind in zip(everyone, kinds, strict=False)
        ]
        alone = [values for i in everyone for values in self._read([works[i]])]
        mixes = [everyone, everyone[::-1], *itertools.pairwise(everyone)]
        return self._heads_are_exact(hidden_size) and all(
            self._read([works[i] for i in mix]) == [alone[i] for i in mix] for mix in mixes
        )

    def _heads_are_exact(self, hidden_size: int) -> bool:
        """Whether heads of several owners give each row its bits, in any order and number."""
        generator = torch.Generator().manual_seed(0)
        heads = [
            _random_head(hidden_size, seed, kind) for seed, kind in enumerate(self._heads.kinds * 2)
        ]
        owners = [heads[i * i % len(heads)] for i in range(_NUM_OWNED)]
        states = [
            torch.randn(1 + i % 3, hidden_size, generator=generator).to(self._device, self._dtype)
            for i in range(_NUM_OWNED)
        ]
        alone = [self._heads.logits([h], [s])[0] for h, s in zip(owners, states, strict=True)]
        for count in (2, 9, _NUM_OWNED):
            order = torch.randperm(_NUM_OWNED, generator=generator)[:count].tolist()
            mixed = self._heads.logits([owners[i] for i in order], [states[i] for i in order])
            if not all(torch.equal(got, alone[i]) for got, i in zip(mixed, order, strict=True)):
                return False
        return True

    def _work(self, prompt: list[int], adapter: Adapter | None) -> Work:
        request = Request(
            prompt_ids=prompt, max_tokens=0, sampling=SamplingParams(), stop_token_ids=frozenset(),
            tenant="", adapter=adapter, logprobs=False, sink=lambda event: None,
            reading=Reading(None),
        )  # fmt: skip
        if adapter is not None:
            request.slot = self._bank.acquire(adapter.digest, adapter.edits)
        return Work(request, len(prompt))

    @torch.inference_mode()
    def _read(self, works: Sequence[Work]) -> list[list[Sequence[float]]]:
        """Returns, of each request, what every door gives for the hidden states of one step."""
        requests = [work.request for work in works]
        states = self._runner.hidden(works)
        doors = []
        for pooling in (*Pooling, None):
            for request in requests:
                request.reading = Reading(pooling)
            read = self._reader.read(requests, states)
            doors.append([result.values if isinstance(result, Read) else () for result in read])
        return [list(values) for values in zip(*doors, strict=True)]


def _random_adapter(sites: Mapping[str, int], hidden_size: int, seed: int, kind: str) -> Adapter:
    head = _random_head(hidden_size, seed, kind)
    return Adapter(base_fingerprint="self-check", edits=random_edits(sites, seed), head=head)


def _random_head(hidden_size: int, seed: int, kind: str) -> Head:
    generator = torch.Generator().manual_seed(seed)
    labels = [str(i) for i in range(2 + seed % 2)]
    sizes = {"h": hidden_size, "l": len(labels)}
    tensors = {
        name: torch.randn(*(sizes[letter] for letter in letters), generator=generator)
        / hidden_size**0.5
        for name, letters in KINDS[kind].items()
    }
    return Head(HeadConfig(kind, labels, "single_label_classification"), tensors)
