"""Whether a task can be trained on a base model: everything but its records."""

from collections.abc import Mapping, Sequence

from redmux.errors import InvalidArgumentError

from ..format.adapter import Adapter, check_base
from .base import TrainingBase
from .learner import Task


def check_task(base: TrainingBase, task: Task, max_pass_tokens: int) -> dict[str, int]:
    """Returns {site: size} of what the task's adapter edits. Weights of the base are not needed.

    Raises InvalidArgumentError for examples that fit into no pass, for sites that the base has not,
    for a head without an encoder and for an adapter to start from that does not fit, WrongBaseError
    where that is of another base.
    """
    if task.options.train == "head" and base.kind != "classifier":
        raise InvalidArgumentError(
            f"task {task.name!r} trains its head alone, which only encoders' adapters have"
        )
    longest = max(example.length for example in (*task.train, *task.valid))
    if longest > max_pass_tokens:
        raise InvalidArgumentError(
            f"max_pass_tokens is {max_pass_tokens}, the longest example has {longest} tokens"
        )
    sites = base.sites_of(task.options)
    if task.start is not None:
        _check_start(base, task.start, sites, task.labels)
    return sites


def _check_start(
    base: TrainingBase, start: Adapter, sites: Mapping[str, int], labels: Sequence[str]
) -> None:
    if base.fingerprint:
        check_base(start, base.fingerprint)
    for site, dim in start.sites.items():
        if site not in sites:
            raise InvalidArgumentError(
                f"the adapter to start from edits {site}, which is not among the sites to train; "
                "choose them by sites, layers and train as it has them"
            )
        if dim != sites[site]:
            raise InvalidArgumentError(
                f"the adapter to start from has {dim} values at {site}, the base {sites[site]}"
            )
    if start.head is None or base.kind != "classifier":
        return
    config = start.head.config
    theirs = () if config.problem_type == "regression" else config.labels
    if config.problem_type == "multi_label_classification" or theirs != tuple(labels):
        raise InvalidArgumentError(
            f"the adapter to start from has a head for {', '.join(config.labels)} "
            f"({config.problem_type}); the data has {', '.join(labels) or 'scores'}"
        )
