"""`redmux train`: trains adapters and tells how it goes."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from redmux.errors import InvalidArgumentError, RedmuxError

from ..bases.match import without_sketch
from .command_line import job_of, parse_arguments
from .events import Evaluated, Event, Finished, Stepped
from .job import Job


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one training and returns its exit code: 0, or 1 if an adapter could not be trained.

    In a sweep it is 0 if any rate went through.
    """
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    try:
        return _train(job_of(arguments), arguments)
    except (RedmuxError, OSError) as err:
        message = err.message if isinstance(err, RedmuxError) else str(err)
        print(f"redmux train: {message}", file=sys.stderr)
        return 1


def _train(job: Job, arguments: argparse.Namespace) -> int:
    # torch and transformers take seconds to import: mistakes and --help answer first.
    import torch

    from .preparation import prepare
    from .run import Run
    from .trainer import Trainer

    options = vars(arguments)
    if "threads" in options:
        if options["threads"] < 1:
            raise InvalidArgumentError(f"threads is {options['threads']}; at least 1")
        torch.set_num_threads(options["threads"])
    is_check = "check_data" in options
    base, tasks, skipped = prepare(job, weights=not is_check)
    for where, what in skipped:
        print(f"left out {where}: {what}", file=sys.stderr)
    if is_check:
        return _print_check(job, base, tasks)
    trainer = Trainer(base, tasks, max_pass_tokens=job.max_pass_tokens, autocast=job.autocast)
    is_dry = "dry_run" in options
    run = None if is_dry else Run(
        job, trainer, resume="resume" in options, tensorboard="tensorboard" in options
    )  # fmt: skip
    _print_plan(trainer)
    if run is None:
        return 0
    endings = _drive(run)
    run.close()
    return _conclude(job, trainer, endings, is_sweep="sweep" in options)


def _print_check(job: Job, base: Any, tasks: Any) -> int:
    """Checks what the trainer would, and tells what it would train on."""
    from .classifier import TrainedHead
    from .fit import check_task

    for task in tasks:
        sites = check_task(base, task, job.max_pass_tokens)
        if base.kind == "classifier":
            TrainedHead(base, task.head_kind, task.labels, task.options.seed)
        longest = max(example.length for example in (*task.train, *task.valid))
        labels = f", labels {', '.join(task.labels)}" if task.labels else ""
        print(
            f"{task.name}: {len(task.train):,} examples, {len(task.valid):,} held out, of at most "
            f"{longest} tokens, {len(sites)} sites, {task.num_steps:,} steps of "
            f"{task.options.batch_size}{labels}"
        )
    return 0


def _print_plan(trainer: Any) -> None:
    base = trainer.base
    fingerprint = without_sketch(base.fingerprint)
    print(f"base {base.name}, {fingerprint}, {base.num_parameters:,} parameters, {base.kind}")
    for learner in trainer.learners:
        task = learner.task
        behind = f", {learner.step} of them done" if learner.step else ""
        print(
            f"{task.name}: {2 * sum(learner.sites.values()):,} values at {len(learner.sites)} "
            f"sites, {len(task.train):,} examples, {len(task.valid):,} held out, "
            f"{task.num_steps:,} steps of {task.options.batch_size}{behind}, "
            f"lr {task.options.learning_rate:g}"
        )
    if not trainer.active:
        return
    plan = trainer.estimate()
    print(
        f"estimate: {_duration(plan.duration_s)} for {plan.num_tokens:,} tokens at "
        f"{plan.tokens_per_s:.0f} tokens/s, {plan.memory_bytes / 2**30:.1f} GiB of memory",
        flush=True,
    )


def _drive(run: Any) -> dict[str, Finished]:
    from tqdm import tqdm

    learners = run.trainer.learners
    total = sum(learner.task.num_steps for learner in learners)
    losses: dict[str, list[float]] = {}  # of each task since its last evaluation
    endings: dict[str, Finished] = {}
    with tqdm(
        total=total, initial=sum(learner.step for learner in learners), unit="step",
        file=sys.stderr, disable=None, leave=False,
    ) as bar:  # fmt: skip
        while run.trainer.active:
            for event in run.advance():
                _take(event, losses, endings, bar, run)
            last = [values[-1] for values in losses.values() if values]
            loss = f"loss {sum(last) / len(last):.3f}, " if last else ""
            bar.set_postfix_str(f"{loss}{run.tokens_per_s:.0f} tokens/s", refresh=False)
    return endings


def _take(
    event: Event, losses: dict[str, list[float]], endings: dict[str, Finished], bar: Any, run: Any
) -> None:
    if isinstance(event, Stepped):
        losses.setdefault(event.task, []).append(event.loss)
        bar.update()
    elif isinstance(event, Evaluated):
        accuracy = "" if event.accuracy is None else f", accuracy {100 * event.accuracy:.1f} %"
        if event.correlation is not None:
            accuracy += f", correlation {event.correlation:.3f}"
        best = ", best so far" if event.is_best else ""
        since = losses.pop(event.task, [])
        trained = f"loss {sum(since) / len(since):.4f}, " if since else ""
        bar.write(
            f"{event.task} step {event.step}: {trained}held out {event.loss:.4f}"
            f"{accuracy}{best} ({_duration(run.elapsed_s)})",
            file=sys.stdout,
        )
        sys.stdout.flush()
    else:
        losses.pop(event.task, None)
        endings[event.task] = event
        bar.total -= next(
            item.task.num_steps - event.step
            for item in run.trainer.learners
            if item.task.name == event.task
        )
        detail = f": {event.detail}" if event.detail else ""
        bar.write(f"{event.task} {event.ending} at step {event.step}{detail}", file=sys.stdout)


def _conclude(job: Job, trainer: Any, endings: dict[str, Finished], is_sweep: bool) -> int:
    num_failed = 0
    for learner in trainer.learners:
        if learner.ending == "diverged":
            num_failed += 1
            continue
        adapter = trainer.adapter(learner.task.name)
        print(f"{job.folder(learner.task.name)}: {adapter.digest}")
    if is_sweep:
        _print_ranking(trainer)
        return int(num_failed == len(trainer.learners))
    return int(num_failed > 0)


def _print_ranking(trainer: Any) -> None:
    judged = [item for item in trainer.learners if item.best and item.ending != "diverged"]
    for learner in sorted(judged, key=lambda item: float(item.best.loss)):
        print(f"{learner.task.name}: held out {learner.best.loss:.4f} at step {learner.best.step}")


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
