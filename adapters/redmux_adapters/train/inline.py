"""Tasks that bring their records with them, as a server is sent them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from redmux.errors import InvalidArgumentError
from redmux.training_data import Faults, Record

from .base import TrainingBase
from .examples import check_form
from .job import split_options
from .learner import Task
from .preparation import Source, task_of


@dataclass(frozen=True)
class InlineTask:
    """What one adapter is trained on, as plain values that JSON can hold.

    A record has the fields of a line of training data. `options` are those of a task in a job
    file, except where the data lies. Without `valid`, a share of the records is held out.
    """

    name: str
    records: Sequence[Mapping[str, Any]]
    valid: Sequence[Mapping[str, Any]] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


def make_inline_tasks(base: TrainingBase, inline: Sequence[InlineTask]) -> list[Task]:
    """Returns the tasks, tokenized. Of the base's weights nothing is needed but their shapes.

    Raises InvalidArgumentError that names the task and, for data, the record and the field: all
    unusable records of all tasks at once, as far as the first of each tells what is learned.
    """
    tasks, faults = [], Faults()
    for index, item in enumerate(inline):
        place = f"tasks[{index}]"
        try:
            tasks.append(_make(base, item, place, faults))
        except InvalidArgumentError as err:
            raise InvalidArgumentError(f"{place}: {err.message}") from None
    faults.raise_any()
    return tasks


def _make(base: TrainingBase, item: InlineTask, place: str, faults: Faults) -> Task:
    data, options = split_options({**item.options, "data": "records"})
    base.choose_sites(options.sites, options.layers)
    train = _records(item.records, f"{place}.records")
    if not train:
        raise InvalidArgumentError("there are no records; give at least one")
    valid = _records(item.valid, f"{place}.valid") if item.valid else None
    source = Source.of(item.name, data, options, train, valid, Faults())
    check_form(base.kind, source.form)
    task = task_of(base, source)
    faults.found += source.faults.found
    return task


def _records(records: Iterable[Mapping[str, Any]], place: str) -> list[Record]:
    return [Record(f"{place}[{index}]", fields) for index, fields in enumerate(records)]
