"""What a load consists of: prompts, lengths, adapters and times of arrival, all from one seed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Assignment = Literal["distinct", "uniform", "zipf"]
_WARM_UP_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Lengths:
    """A number of tokens, drawn uniformly from `low` to `high`, both included."""

    low: int
    high: int


@dataclass(frozen=True, slots=True)
class Planned:
    """One request of a load; `adapter` None is the base model."""

    prompt_ids: tuple[int, ...]
    output_tokens: int
    adapter: str | None
    due_s: float | None = None  # after the start of the wave; None: as soon as a place is free


@dataclass(frozen=True, slots=True)
class Workload:
    """How the requests of a wave are drawn.

    `rate_per_s` None is a closed loop; otherwise requests arrive as a Poisson process. The ids of
    prompts are uniform over the vocabulary, so no two waves of different seeds share a prefix.
    """

    prompt: Lengths
    output: Lengths
    vocab_size: int
    assignment: Assignment = "distinct"
    zipf_exponent: float = 1.0
    rate_per_s: float | None = None

    def plan(
        self, num_requests: int, adapters: Sequence[str], seed: int | Sequence[int]
    ) -> list[Planned]:
        """Returns the requests of one wave; equal seeds give equal waves."""
        rng = np.random.default_rng(seed)
        prompts = _draw(self.prompt, num_requests, rng)
        outputs = _draw(self.output, num_requests, rng)
        names: list[str | None] = [None] * num_requests
        if adapters:
            indices = assign(self.assignment, num_requests, len(adapters), rng, self.zipf_exponent)
            names = [adapters[i] for i in indices]
        dues: Sequence[float | None] = [None] * num_requests
        if self.rate_per_s is not None:
            dues = arrivals(self.rate_per_s, num_requests, rng)
        return [
            Planned(tuple(rng.integers(self.vocab_size, size=size).tolist()), output, name, due)
            for size, output, name, due in zip(prompts, outputs, names, dues, strict=True)
        ]

    def warm_up(self, concurrency: int, adapters: Sequence[str], seed: int) -> list[Planned]:
        """Returns short requests that fill a batch and use every adapter once."""
        short = Lengths(_WARM_UP_TOKENS, _WARM_UP_TOKENS)
        closed = Workload(self.prompt, short, self.vocab_size)
        return closed.plan(max(concurrency, len(adapters)), adapters, (seed, 0))


def assign(
    kind: Assignment,
    num_requests: int,
    num_adapters: int,
    rng: np.random.Generator,
    zipf_exponent: float = 1.0,
) -> list[int]:
    """Returns the index of each request's adapter.

    "distinct" takes them in turn, "uniform" draws them, "zipf" draws adapter k (from 1) with a
    probability proportional to k ** -zipf_exponent.
    """
    if kind == "distinct":
        return [i % num_adapters for i in range(num_requests)]
    exponent = zipf_exponent if kind == "zipf" else 0.0
    weights = np.arange(1, num_adapters + 1) ** -exponent
    drawn: list[int] = rng.choice(num_adapters, num_requests, p=weights / weights.sum()).tolist()
    return drawn


def arrivals(rate_per_s: float, num_requests: int, rng: np.random.Generator) -> list[float]:
    """Returns when each request of a Poisson process is due, in seconds from its start."""
    due_s: list[float] = rng.exponential(1 / rate_per_s, num_requests).cumsum().tolist()
    return due_s


def _draw(lengths: Lengths, count: int, rng: np.random.Generator) -> list[int]:
    drawn: list[int] = rng.integers(lengths.low, lengths.high, count, endpoint=True).tolist()
    return drawn
