"""`redmux bench drafts`: adapters' answers to their test texts with drafts against without."""

import argparse
import asyncio
import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from redmux_adapters.bases.load import DEFAULT_MODEL
from redmux_bench import report
from redmux_bench.lone_engine import LoneEngine
from redmux_bench.rounds import median_ratio
from redmux_bench.server_process import serve_flags
from redmux_bench.steps import greedy_request
from redmux_bench.tables import print_table
from redmux_bench.zoo_texts import BASE, Subject, read_subjects
from redmux_server.config import load_config
from redmux_server.engine.request import Request, SamplingParams

_TOGETHER = "all adapters"
_PER_PLACE = {1: 4, 8: 2}  # requests of a wave for each that is open at a time; one where more are
_LEARNING = 32  # requests at a time, where they are not measured
_COMPARED = 8  # at most, of a subject and concurrency, by their log-probabilities


@dataclass(slots=True)
class _Row:
    """Waves of one subject at one concurrency, a value for each round."""

    plain_s: list[float] = field(default_factory=list)
    drafting_s: list[float] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    equal_bits: bool = True


class _Engines:
    """Two engines of one model, of which one drafts; both are asked the same, in turn."""

    def __init__(self, options: argparse.Namespace) -> None:
        flags = serve_flags(options, max(*options.concurrency, _LEARNING))
        # What one engine keeps in the cache the other would write over.
        config = load_config(["--device", "cpu", "--prefix-cache=false", *flags])
        self._plain = LoneEngine(replace(config, drafts="off"))
        self.model = self._plain.model
        self._drafting = LoneEngine(replace(config, drafts="auto"), self.model)
        self._options = options

    async def measure(self, subjects: Sequence[Subject]) -> dict[tuple[str, int], _Row]:
        """Returns the waves of every subject at every concurrency."""
        engines = (self._plain.engine, self._drafting.engine)
        for engine in engines:
            engine.start()
        try:
            for subject in subjects:
                await self._learn(subject)
            places = [*itertools.product(self._options.concurrency, subjects)]
            rows = {(subject.name, level): _Row() for level, subject in places}
            with report.progress(self._options.rounds * len(places), "wave") as bar:
                for number in range(self._options.rounds):
                    for i, (level, subject) in enumerate(places):
                        row = rows[subject.name, level]
                        prompts = await self._wave(row, subject, level, (number + i) % 2 == 0)
                        if not number:
                            row.equal_bits &= await self._has_equal_bits(subject, prompts, level)
                        bar.update()
        finally:
            for engine in engines:
                await engine.stop()
        return rows

    async def _learn(self, subject: Subject) -> None:
        """Asks what is not measured: the engine that drafts all of it, the other some."""
        prompts = subject.take(self._options.learned)
        await self._drafting.answer(self._requests(subject, prompts), _LEARNING)
        await self._plain.answer(self._requests(subject, prompts[:_COMPARED]), _LEARNING)

    async def _wave(
        self, row: _Row, subject: Subject, level: int, plain_first: bool
    ) -> list[list[int]]:
        """Asks both engines, and returns what."""
        prompts = subject.take(level * _PER_PLACE.get(level, 1))
        found = {}
        for is_plain in (plain_first, not plain_first):
            engine = self._plain if is_plain else self._drafting
            requests = self._requests(subject, prompts)
            started_s = time.perf_counter()
            found[is_plain] = await engine.answer(requests, level)
            elapsed_s = time.perf_counter() - started_s
            (row.plain_s if is_plain else row.drafting_s).append(elapsed_s)
        row.num_tokens.append(sum(map(len, found[True])))
        row.equal_bits &= found[True] == found[False]
        return prompts

    async def _has_equal_bits(
        self, subject: Subject, prompts: Sequence[list[int]], level: int
    ) -> bool:
        """Whether log-probabilities are equal, too, also of requests that draw by a seed."""
        prompts = prompts[: min(_COMPARED, 2 * level)]
        plain, drafting = [
            await engine.answer(self._requests(subject, prompts, told=True), level)
            for engine in (self._plain, self._drafting)
        ]
        return plain == drafting

    def _requests(
        self, subject: Subject, prompts: Sequence[list[int]], *, told: bool = False
    ) -> list[Request]:
        requests = []
        for i, prompt_ids in enumerate(prompts):
            request = greedy_request(prompt_ids, self._options.max_tokens, subject.adapter)
            request.stop_token_ids = frozenset(self.model.codec.eos_token_ids)
            if told:
                request.logprobs = True
                request.sampling = SamplingParams(temperature=float(i % 2), seed=i)
            requests.append(request)
        return requests


def run(options: argparse.Namespace) -> int:
    """Measures in this process, without a server; returns 1 if any bit differs."""
    engines = _Engines(options)
    subjects = read_subjects(engines.model, Path(options.data), dict(options.adapter))
    rows = asyncio.run(engines.measure(subjects))
    for level in options.concurrency:
        rows[_TOGETHER, level] = _sum([rows[s.name, level] for s in subjects if s.name != BASE])
    told = [_told(name, level, row) for (name, level), row in rows.items()]
    print_table(
        ("adapter", "at once", "ratio", "equal bits", "tokens/s", "with drafts"),
        [[*row.values()][:-1] for row in told],
    )
    report.write_json(options, options.model or DEFAULT_MODEL, {"rows": told})
    return 0 if all(row.equal_bits for row in rows.values()) else 1


def _sum(rows: Sequence[_Row]) -> _Row:
    """Returns what the adapters come to together, round by round."""
    return _Row(
        [sum(round_s) for round_s in zip(*(row.plain_s for row in rows), strict=True)],
        [sum(round_s) for round_s in zip(*(row.drafting_s for row in rows), strict=True)],
        [sum(counts) for counts in zip(*(row.num_tokens for row in rows), strict=True)],
        all(row.equal_bits for row in rows),
    )


def _told(name: str, concurrency: int, row: _Row) -> dict[str, Any]:
    """Returns a row of the results; the ratio is the median of the rounds' ratios."""

    def rate(seconds: Sequence[float]) -> float:
        return statistics.median(n / s for n, s in zip(row.num_tokens, seconds, strict=True))

    return {
        "adapter": name,
        "concurrency": concurrency,
        "ratio": median_ratio(row.plain_s, row.drafting_s),
        "equal_bits": row.equal_bits,
        "tokens_per_s": rate(row.plain_s),
        "drafting_tokens_per_s": rate(row.drafting_s),
        "rounds": [a / b for a, b in zip(row.plain_s, row.drafting_s, strict=True)],
    }
