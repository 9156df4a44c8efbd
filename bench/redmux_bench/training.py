"""`redmux bench train`: K adapters in shared passes against K trainings one after the other."""

import argparse
import random
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from redmux_adapters.bases.kind import model_kind
from redmux_adapters.bases.load import DEFAULT_MODEL, read_config
from redmux_adapters.train import (
    Example,
    Stepped,
    Task,
    Trainer,
    TrainingBase,
    TrainingOptions,
    load_training_base,
)
from redmux_bench import report
from redmux_bench.rounds import in_turn, median_ratio
from redmux_bench.tables import print_table
from redmux_bench.workload import Lengths


def run(options: argparse.Namespace) -> int:
    """Trains both ways in turn, in this process."""
    if options.threads:
        torch.set_num_threads(options.threads)
    model = options.model or DEFAULT_MODEL
    is_encoder = model_kind(read_config(model)) == "encoder"
    base = load_training_base(model, "classifier" if is_encoder else "causal", torch.float32)
    rows = [_measure(options, base, batch_size) for batch_size in options.batch_sizes]
    print_table(
        ("examples a step", f"{options.tasks} together tokens/s", "one by one", "ratio"),
        [list(row.values())[:4] for row in rows],
    )
    threads = torch.get_num_threads()
    report.write_json(options, model, {"tasks": options.tasks, "threads": threads, "rows": rows})
    return 0


def _measure(options: argparse.Namespace, base: TrainingBase, batch_size: int) -> dict[str, Any]:
    """Returns both ways with one number of examples per adapter and step.

    Rates are of tokens that belong to examples, of all adapters, per second of training steps:
    loading and setting up is in neither. Medians over the rounds; `ratio` is that of the rounds'
    ratios.
    """
    tasks = [_task(options, base, number, batch_size) for number in range(options.tasks)]
    # The first steps, in which libraries set themselves up, are measured in no round.
    _rate(options, base, [tasks], 1)
    _rate(options, base, [[tasks[0]]], 1)
    with report.progress(2 * options.rounds, "turn") as bar:

        def rate(runs: Sequence[Sequence[Task]]) -> float:
            bar.update()
            return _rate(options, base, runs, options.steps)

        together, apart = in_turn(
            options.rounds, lambda: rate([tasks]), lambda: rate([[t] for t in tasks]), warm_ups=0
        )
    return {
        "batch_size": batch_size,
        "together_tokens_per_s": statistics.median(together),
        "apart_tokens_per_s": statistics.median(apart),
        "ratio": median_ratio(together, apart),
        "together_rounds": together,
        "apart_rounds": apart,
    }


def _rate(
    options: argparse.Namespace, base: TrainingBase, runs: Sequence[Sequence[Task]], steps: int
) -> float:
    """Returns the tokens per second of some steps of each run, one run after the other."""
    num_tokens, duration_s = 0, 0.0
    for tasks in runs:
        trainer = Trainer(
            base, tasks, max_pass_tokens=options.max_pass_tokens, autocast=options.autocast
        )
        start = time.perf_counter()
        for _ in range(steps):
            events = trainer.step()
            num_tokens += sum(e.num_tokens for e in events if isinstance(e, Stepped))
        duration_s += time.perf_counter() - start
        trainer.close()
    return num_tokens / duration_s


def _task(options: argparse.Namespace, base: TrainingBase, number: int, batch_size: int) -> Task:
    drawn = random.Random(f"{options.seed}/{number}")
    vocabulary = base.model.config.get_text_config().vocab_size

    def tokens(lengths: Lengths) -> tuple[int, ...]:
        length = drawn.randint(lengths.low, lengths.high)
        return tuple(drawn.randrange(vocabulary) for _ in range(length))

    is_encoder = base.kind == "classifier"
    examples = [
        Example(tokens(options.prompt_tokens), label=i % 2)
        if is_encoder
        else Example(tokens(options.prompt_tokens), tokens(options.output_tokens))
        for i in range(max(32, batch_size))
    ]
    # More steps than are taken: neither way comes to an end.
    training = TrainingOptions(
        learning_rate=1e-3, steps=1_000_000, batch_size=batch_size, seed=number
    )
    labels = ("0", "1") if is_encoder else ()
    return Task(f"bench-{number}", examples, training, labels=labels)
