"""From a job to tasks that can be trained: reads the data, loads the base, reports what is bad."""

import random
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import torch

from redmux.errors import InvalidArgumentError
from redmux.training_data import Faults, Record

from ..bases.kind import ModelKind, model_kind
from ..bases.load import check_tokenizer, read_config
from ..format.config import AdapterMetadata
from ..format.files import read_adapter
from ..format.window import ALL
from .base import TrainingBase, load_training_base, load_without_weights
from .examples import ExampleReader, Form, Kind, check_form, form_of, labels_of
from .job import DataOptions, Job, TaskSpec
from .learner import Task
from .options import TrainingOptions, default_learning_rate
from .prompts import PromptWriter
from .records import read_records

_MOST_HELD_OUT = 200


class Prepared(NamedTuple):
    """A base and tasks for a Trainer, and the records that were left out."""

    base: TrainingBase
    tasks: list[Task]
    skipped: list[tuple[str, str]]  # place, what was wrong


class Source(NamedTuple):
    """The records of one task, read and divided, and what is wrong with them."""

    name: str
    data: DataOptions
    options: TrainingOptions
    train: list[Record]
    valid: list[Record]
    form: Form
    faults: Faults

    @classmethod
    def of(
        cls, name: str, data: DataOptions, options: TrainingOptions, train: list[Record],
        valid: list[Record] | None, faults: Faults,
    ) -> "Source":  # fmt: skip
        """Returns the source of records; where `valid` is None, a share of `train` is held out.

        Raises InvalidArgumentError where nothing says what is to be learned.
        """
        if not train:
            faults.raise_any()
        form = form_of(train)
        if valid is None:
            train, valid = _split(train, data.valid_share, options.seed)
        return cls(name, data, options, train, valid, form, faults)


def prepare(job: Job, *, weights: bool = True) -> Prepared:
    """Returns what the job trains on; without `weights` the base is good for checks alone.

    Raises InvalidArgumentError that lists unusable records by file and line, unless they are to be
    left out; for a base model that cannot be loaded; and for data that does not fit it.
    """
    if weights and job.device != "cpu" and not torch.cuda.is_available():
        raise InvalidArgumentError(f"device is {job.device!r}, but torch finds no CUDA device here")
    sources = [_read(spec) for spec in job.tasks]
    check_tokenizer(job.base, job.tokenizer)
    kind = training_kind(job.base)
    for source in sources:
        check_form(kind, source.form)
    if weights:
        base = load_training_base(job.base, kind, getattr(torch, job.dtype), job.tokenizer)
        base.model.to(job.device)
    else:
        base = load_without_weights(job.base, kind, tokenizer=job.tokenizer)
    tasks, skipped = make_tasks(base, sources)
    return Prepared(base, tasks, skipped)


def make_tasks(
    base: TrainingBase, sources: Iterable[Source]
) -> tuple[list[Task], list[tuple[str, str]]]:
    """Returns the tasks of some sources, tokenized, and the records left out (place, reason).

    Raises InvalidArgumentError that lists the unusable records which are not to be left out.
    """
    sources = list(sources)
    tasks = [task_of(base, source) for source in sources]
    refused, skipped = Faults(), []
    for source in sources:
        if source.data.skip_bad:
            skipped += source.faults.found
        else:
            refused.found += source.faults.found
    refused.raise_any()
    return tasks, list(dict.fromkeys(skipped))


def _read(spec: TaskSpec) -> Source:
    faults, data = Faults(), spec.data
    train = read_records(data.data, data.columns, faults)
    valid = read_records(data.valid, data.columns, faults) if data.valid is not None else None
    return Source.of(spec.name, data, spec.options, train, valid, faults)


def _split(records: list[Record], share: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Returns training and held-out records, each in their order."""
    num_held_out = min(_MOST_HELD_OUT, round(share * len(records)), len(records) - 1)
    chosen = set(random.Random(f"{seed}/held out").sample(range(len(records)), num_held_out))
    train = [record for i, record in enumerate(records) if i not in chosen]
    return train, [record for i, record in enumerate(records) if i in chosen]


def training_kind(base: str) -> Kind:
    """Returns what a base model learns, by its configuration; raises what `read_config` does."""
    kinds: dict[ModelKind, Kind] = {
        "causal": "causal",
        "encoder": "classifier",
        "encoder_decoder": "seq2seq",
    }
    return kinds[model_kind(read_config(base))]


def task_of(base: TrainingBase, source: Source) -> Task:
    """Returns the task of a source, tokenized; what is wrong with its records is in its faults.

    Raises InvalidArgumentError where no record is usable, or for options that the base lacks.
    """
    data = source.data
    start = read_adapter(data.start) if data.start else None
    labels = data.labels
    if "label" in source.form and not labels:
        head = None if start is None else start.head
        labels = labels_of(source.train) if head is None else tuple(head.config.labels)
    prompt_format = data.prompt_format
    if prompt_format == "auto" and start is not None and start.prompt_format is not None:
        prompt_format = start.prompt_format
    writer = PromptWriter(base.tokenizer, prompt_format, base.eos_ids)
    apply = source.options.apply or (ALL if start is None else start.apply)
    if apply != ALL and base.kind != "causal":
        raise InvalidArgumentError(
            f"apply is {apply!r}, which is for decoders; adapters of other models edit all tokens"
        )
    reader = ExampleReader(
        base.kind, source.form, writer, _limit(base, data.max_length), labels, apply
    )
    train = reader.read(source.train, source.faults)
    valid = reader.read(source.valid, source.faults)
    if not train:
        source.faults.raise_any()
    options = replace(source.options, apply=None if apply == ALL else apply)
    if options.learning_rate is None:
        options = replace(
            options,
            learning_rate=default_learning_rate(base.num_parameters, base.kind == "classifier"),
        )
    return Task(
        source.name, train, options, valid,
        writer.prompt_format if base.kind == "causal" else None, labels, start,
        AdapterMetadata(
            description=data.description, license=data.license, training_data=data.training_data
        ),
    )  # fmt: skip


def _limit(base: TrainingBase, max_length: int) -> int:
    """Returns the largest length that the user and the model's positions allow."""
    positions = getattr(base.model.config.get_text_config(), "max_position_embeddings", None)
    if positions is None or base.kind == "seq2seq":
        return max_length
    # RoBERTa's positions begin behind the padding token's.
    first = 2 if base.model.config.model_type in ("roberta", "xlm-roberta", "camembert") else 0
    return min(max_length, int(positions) - first)
