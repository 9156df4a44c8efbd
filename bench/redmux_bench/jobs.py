"""`redmux bench jobs`: latencies of a load while the server trains, against the same load alone."""

import argparse
import asyncio
import random
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from redmux import AsyncClient, FailedPreconditionError, TrainingStep, TrainingTask
from redmux_bench import report
from redmux_bench.load import LoadGenerator
from redmux_bench.rounds import median_ratio
from redmux_bench.server_process import Target, reach
from redmux_bench.summary import Summary, summarize
from redmux_bench.tables import print_table
from redmux_bench.workload import Workload

_WORDS = ("the", "of", "to", "and", "in", "that", "it", "with", "as", "for", "was", "on", "are")
_RECORDS = 64
_RECORD_WORDS = 24  # of a prompt; the completion has a quarter
_STEPS = 10_000  # more than are taken: the job is cancelled


@dataclass(frozen=True, slots=True)
class _Turn:
    summary: Summary
    training_tokens_per_s: float


def run(options: argparse.Namespace) -> int:
    """Measures both sides in turn; returns 1 if a request failed."""
    with reach(options, options.concurrency) as target:
        model, turns = asyncio.run(_measure(options, target))
    rows = [_row(is_training, turns[is_training]) for is_training in (False, True)]
    alone, beside = rows
    ratio = median_ratio(beside["p99_rounds_ms"], alone["p99_rounds_ms"])
    print_table(
        ("training", "between tokens p50 ms", "p99 ms", "output tokens/s", "trained tokens/s"),
        [("no", *list(alone.values())[1:-1]), ("yes", *list(beside.values())[1:-1])],
    )
    print(f"p99 between tokens while training over that alone: {ratio:.3g}")
    failures: dict[str, int] = {}
    for turn in (*turns[False], *turns[True]):
        failures |= turn.summary.failures
    results = {"rows": rows, "p99_ratio": ratio, "failures": failures}
    report.write_json(options, model, results)
    return 1 if failures else 0


async def _measure(
    options: argparse.Namespace, target: Target
) -> tuple[str, dict[bool, list[_Turn]]]:
    turns: dict[bool, list[_Turn]] = {False: [], True: []}
    async with target.client() as client:
        info = await client.info()
        workload = Workload(options.prompt_tokens, options.output_tokens, info.vocab_size)
        generator = LoadGenerator(client, timeout_s=options.timeout)
        warm_up = workload.warm_up(options.concurrency, (), options.seed)
        await generator.run(warm_up, options.concurrency)
        with report.progress(2 * options.rounds, "turn") as bar:
            for number in range(options.rounds):
                order = (False, True) if number % 2 == 0 else (True, False)
                for is_training in order:
                    seed = (options.seed, 5, number, int(is_training))
                    requests = workload.plan(options.num_requests, (), seed)
                    async with _training(options, client, is_training, number) as counts:
                        before, start_s = counts.num_tokens, time.perf_counter()
                        wave = await generator.run(requests, options.concurrency)
                        rate = (counts.num_tokens - before) / (time.perf_counter() - start_s)
                        counts.check()
                    turns[is_training].append(_Turn(summarize(wave), rate))
                    bar.update()
    return info.model, turns


class _Counts:
    """The tokens that a job has trained on, as its stream tells."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self.has_begun = asyncio.Event()
        self.watching: asyncio.Task[None] | None = None

    async def watch(self, client: AsyncClient, job_id: str) -> None:
        """Counts until the job ends."""
        try:
            async with aclosing(client.jobs.watch(job_id)) as events:
                async for event in events:
                    if isinstance(event, TrainingStep):
                        self.num_tokens += event.num_tokens
                        self.has_begun.set()
        finally:
            self.has_begun.set()  # nobody is to wait for one that failed

    def check(self) -> None:
        """Raises FailedPreconditionError if the job has ended, so that nothing was beside."""
        if self.watching is not None and self.watching.done():
            raise FailedPreconditionError("the training job ended before the load did")


@asynccontextmanager
async def _training(
    options: argparse.Namespace, client: AsyncClient, is_training: bool, number: int
) -> AsyncIterator[_Counts]:
    """Trains a job inside the block, if `is_training`, from behind its first step on."""
    counts = _Counts()
    if not is_training:
        yield counts
        return
    job = await client.jobs.create(_tasks(options, number))
    counts.watching = asyncio.create_task(counts.watch(client, job.id))
    try:
        await counts.has_begun.wait()
        counts.check()
        yield counts
    finally:
        await client.jobs.cancel(job.id)
        await counts.watching


def _tasks(options: argparse.Namespace, number: int) -> list[TrainingTask]:
    drawn = random.Random(f"{options.seed}/{number}")

    def text(num_words: int) -> str:
        return " ".join(drawn.choice(_WORDS) for _ in range(num_words))

    return [
        TrainingTask(
            f"bench/job-{options.seed}-{number}-{index}",
            [
                {"prompt": text(_RECORD_WORDS), "completion": text(_RECORD_WORDS // 4)}
                for _ in range(_RECORDS)
            ],
            options={
                "steps": _STEPS, "batch_size": options.batch_size, "learning_rate": 1e-3,
                "valid_share": 0.0, "prompt_format": "raw",
            },
        )
        for index in range(options.tasks)
    ]  # fmt: skip


def _row(is_training: bool, turns: Sequence[_Turn]) -> dict[str, Any]:
    """Returns one side, medians over the rounds: milliseconds between tokens, and the load's rate.

    `training_tokens_per_s` counts the tokens of examples in steps that ended beside the load.
    """
    latencies = [t.summary.inter_token_ms for t in turns if t.summary.inter_token_ms is not None]
    if len(latencies) < len(turns):
        raise FailedPreconditionError("a wave brought no two tokens of a request; see the server")
    return {
        "is_training": is_training,
        "inter_token_p50_ms": statistics.median(latency.p50 for latency in latencies),
        "inter_token_p99_ms": statistics.median(latency.p99 for latency in latencies),
        "output_tokens_per_s": statistics.median(t.summary.output_tokens_per_s for t in turns),
        "training_tokens_per_s": statistics.median(turn.training_tokens_per_s for turn in turns),
        "p99_rounds_ms": [latency.p99 for latency in latencies],
    }
