"""Tasks that can be learned in a few steps."""

import random

from redmux_adapters.train import Example, Task, TrainingOptions


def examples(seed: int, count: int = 24, answer: int | None = None) -> list[Example]:
    """Random prompts of random lengths, each with the same answer of one to four tokens."""
    drawn = random.Random(seed)
    token = answer or drawn.randrange(1, 250)
    return [
        Example(
            tuple(drawn.randrange(1, 250) for _ in range(drawn.randint(3, 20))),
            (token,) * drawn.randint(1, 3) + (0,),
        )
        for _ in range(count)
    ]


def make_task(name="task", seed=0, valid=0, **options):
    values = {"learning_rate": 0.02, "steps": 6, "batch_size": 4, "seed": seed, "eval_every": 3}
    return Task(
        name,
        examples(seed),
        TrainingOptions(**values | options),
        valid=examples(seed + 100, valid) if valid else (),
    )


def run(trainer):
    """All events up to the end of every task."""
    events = []
    while trainer.active:
        events += trainer.step()
    trainer.close()
    return events


def furthest(one, other) -> float:
    """The largest difference between two adapters' values."""
    assert one.sites == other.sites
    return max(
        float((getattr(one.edits[site], part) - getattr(other.edits[site], part)).abs().max())
        for site in one.sites
        for part in ("scale", "bias")
    )
