"""Job: which adapters a run trains, on which data; from a file or from the command line."""

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from redmux._nearest import nearest
from redmux.errors import InvalidArgumentError

from ..format.prompt import PromptFormat
from .options import OPTION_NAMES, TrainingOptions
from .records import DATASETS_PREFIX

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_DEVICE = re.compile(r"cpu|cuda(:\d+)?")
_NOTHING: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class DataOptions:
    """Where a task's examples come from, how they are written, and what is said about them."""

    data: str  # .jsonl or .csv file, or "datasets:NAME[:SPLIT]"
    valid: str | None = None  # held-out data; None: a share of `data` is held out
    valid_share: float = 0.1  # at most 200 examples; 0: nothing is held out
    columns: Mapping[str, str] = field(default_factory=lambda: _NOTHING)
    prompt_format: str | PromptFormat = "auto"
    max_length: int = 512  # tokens of an example; longer ones are refused
    labels: tuple[str, ...] = ()  # of a classifier, in their order; (): those that occur
    start: str = ""  # adapter whose vectors and head the training starts from; "": no edit
    skip_bad: bool = False  # leave unusable records out instead of refusing the data
    description: str = ""
    license: str = ""
    training_data: str = ""  # what the data is, for the adapter's metadata

    def __post_init__(self) -> None:
        for name in ("data", "start", "description", "license", "training_data"):
            _require(isinstance(getattr(self, name), str), name, getattr(self, name), "a text")
        _require(bool(self.data), "data", self.data, "a file or datasets:NAME")
        _require(self.valid is None or isinstance(self.valid, str), "valid", self.valid, "a file")
        share = self.valid_share
        is_share = isinstance(share, int | float) and not isinstance(share, bool)
        _require(is_share and 0 <= share < 1, "valid_share", share, "a share from 0 to below 1")
        _require(
            type(self.max_length) is int and self.max_length > 1,
            "max_length", self.max_length, "a whole number above 1",
        )  # fmt: skip
        _require(type(self.skip_bad) is bool, "skip_bad", self.skip_bad, "true or false")
        texts = isinstance(self.columns, Mapping) and all(
            isinstance(text, str) for pair in self.columns.items() for text in pair
        )
        _require(texts, "columns", self.columns, "names with the source's names for them")
        if isinstance(self.labels, list):
            object.__setattr__(self, "labels", tuple(self.labels))
        is_labels = isinstance(self.labels, tuple) and len(set(self.labels)) == len(self.labels)
        is_labels = is_labels and all(isinstance(label, str) for label in self.labels)
        _require(is_labels, "labels", self.labels, "different texts")
        if isinstance(self.prompt_format, dict):
            turns = PromptFormat.from_json({"type": "turns", **self.prompt_format})
            object.__setattr__(self, "prompt_format", turns)


@dataclass(frozen=True)
class TaskSpec:
    """One adapter of a job. The name becomes the name of its folder."""

    name: str
    data: DataOptions
    options: TrainingOptions

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise InvalidArgumentError(
                f"the task name {self.name!r} has to be 1 to 100 of A-Z a-z 0-9 . _ -, beginning "
                "with a letter or digit"
            )


@dataclass(frozen=True)
class Job:
    """A run: one base model, and the tasks that are trained on it together."""

    tasks: tuple[TaskSpec, ...]
    output: str
    base: str = "smollm2"
    tokenizer: str = ""  # folder or hub id of one to use instead of the base's own
    dtype: str = "float32"  # of the base; the vectors are fp32 always
    autocast: bool = False  # compute the base's products in bf16
    device: str = "cpu"
    max_pass_tokens: int = 2048
    checkpoint_every: int = 50  # steps of the run

    def __post_init__(self) -> None:
        _require(bool(self.tasks), "tasks", self.tasks, "at least one task")
        _require(isinstance(self.base, str), "base", self.base, "a model")
        _require(isinstance(self.tokenizer, str), "tokenizer", self.tokenizer, "a tokenizer")
        _require(
            isinstance(self.output, str) and self.output != "", "output", self.output, "a folder"
        )
        dtypes = ("float32", "bfloat16")
        _require(self.dtype in dtypes, "dtype", self.dtype, f"one of {', '.join(dtypes)}")
        _require(type(self.autocast) is bool, "autocast", self.autocast, "true or false")
        is_device = isinstance(self.device, str) and _DEVICE.fullmatch(self.device) is not None
        _require(is_device, "device", self.device, "cpu, cuda or cuda:N")
        for name in ("max_pass_tokens", "checkpoint_every"):
            value = getattr(self, name)
            _require(type(value) is int and value > 0, name, value, "a whole number above 0")
        names = [task.name for task in self.tasks]
        twice = sorted({name for name in names if names.count(name) > 1})
        _require(not twice, "tasks", ", ".join(twice), "of different names")

    def sweep(self, rates: Sequence[float]) -> "Job":
        """Returns the job with every task once for each learning rate, all in the same passes."""
        tasks = (
            TaskSpec(
                f"{task.name}-lr{rate:g}", task.data, replace(task.options, learning_rate=rate)
            )
            for task in self.tasks
            for rate in rates
        )
        return replace(self, tasks=tuple(tasks))

    def folder(self, name: str) -> Path:
        """Returns the folder of a task's adapter: that of the run if there is only one task."""
        output = Path(self.output).expanduser()
        return output if len(self.tasks) == 1 else output / name


RUN_KEYS = tuple(item.name for item in fields(Job) if item.name != "tasks")
DATA_KEYS = tuple(item.name for item in fields(DataOptions))


def read_job(path: str | Path, overrides: Mapping[str, Any]) -> Job:
    """Returns the job that a .toml or .json file describes.

    The file has the keys of `Job`, `defaults` (an object of options for every task) and `tasks`
    (a list of objects: `name`, `data` and options). Relative paths in it start from its folder.
    `overrides` are run-level keys that come before those of the file. Raises InvalidArgumentError.
    """
    path = Path(path).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
        value = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except OSError as err:
        raise InvalidArgumentError(f"cannot read {path}: {err.strerror}") from None
    except ValueError as err:
        raise InvalidArgumentError(f"{path} is neither valid TOML nor JSON: {err}") from None
    if not isinstance(value, dict) or not isinstance(value.get("tasks"), list):
        raise InvalidArgumentError(f"{path.name} has no list of tasks")
    defaults = value.get("defaults", {})
    _check_keys(value, (*RUN_KEYS, "defaults", "tasks"), path.name)
    _check_keys(defaults, (*DATA_KEYS, *OPTION_NAMES), f"defaults of {path.name}")
    tasks = []
    for number, item in enumerate(value["tasks"], 1):
        _check_keys(item, ("name", *DATA_KEYS, *OPTION_NAMES), f"task {number} of {path.name}")
        values = {**defaults, **item}
        for name in ("data", "valid", "start"):
            place = values.get(name)
            if place and isinstance(place, str) and not place.startswith(DATASETS_PREFIX):
                values[name] = str(path.parent / Path(place).expanduser())
        tasks.append(make_task(values.pop("name", ""), values))
    run = {key: value[key] for key in RUN_KEYS if key in value}
    if "output" in run and isinstance(run["output"], str):
        run["output"] = str(path.parent / Path(run["output"]).expanduser())
    run |= overrides
    if "output" not in run:
        raise InvalidArgumentError(f"{path.name} has no output; give a folder")
    return Job(tuple(tasks), **run)


def make_task(name: str, values: Mapping[str, Any]) -> TaskSpec:
    """Returns the task of a flat mapping of options; absent ones have their defaults."""
    if "data" not in values:
        raise InvalidArgumentError(f"task {name!r} has no data")
    try:
        data, options = split_options(values)
    except InvalidArgumentError as err:
        raise InvalidArgumentError(f"task {name!r}: {err.message}") from None
    return TaskSpec(name, data, options)


def split_options(values: Mapping[str, Any]) -> tuple[DataOptions, TrainingOptions]:
    """Returns the options of a flat mapping that are about the data, and those about training."""
    return (
        DataOptions(**{key: values[key] for key in DATA_KEYS if key in values}),
        TrainingOptions(**{key: values[key] for key in OPTION_NAMES if key in values}),
    )


def _check_keys(value: object, known: Sequence[str], what: str) -> None:
    if not isinstance(value, dict):
        raise InvalidArgumentError(f"{what} is {value!r}; it has to be an object")
    for key in value:
        if key not in known:
            near = nearest(key, known)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise InvalidArgumentError(f"unknown key {key!r} in {what}; {hint}")


def _require(is_right: bool, name: str, value: object, right: str) -> None:
    if not is_right:
        raise InvalidArgumentError(f"{name} is {value!r}; it has to be {right}")
