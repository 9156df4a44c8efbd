"""The GLUE tasks: where their texts are, and how the paper splits them."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Record = dict[str, str | float]  # text, text_pair of tasks on pairs, and label or score


@dataclass(frozen=True)
class GlueTask:
    """One task: the hub's names of its texts, its labels in GLUE's order, the metrics to report.

    The first metric is the one in the paper's tables. A task without labels has scores.
    """

    texts: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    valid: str = "validation"


TASKS: Mapping[str, GlueTask] = {
    "cola": GlueTask(("sentence",), ("0", "1"), ("matthews", "accuracy")),
    "sst2": GlueTask(("sentence",), ("0", "1"), ("accuracy",)),
    "mrpc": GlueTask(("sentence1", "sentence2"), ("0", "1"), ("accuracy", "f1")),
    "stsb": GlueTask(("sentence1", "sentence2"), (), ("pearson", "spearman")),
    "qqp": GlueTask(("question1", "question2"), ("0", "1"), ("accuracy", "f1")),
    "mnli": GlueTask(
        ("premise", "hypothesis"), ("0", "1", "2"), ("accuracy",), "validation_matched"
    ),
    "qnli": GlueTask(("question", "sentence"), ("0", "1"), ("accuracy",)),
    "rte": GlueTask(("sentence1", "sentence2"), ("0", "1"), ("accuracy",)),
}


@dataclass(frozen=True)
class Split:
    """Training records, and the two halves of GLUE's validation set: to choose by, and to test."""

    train: list[Record]
    valid: list[Record]
    test: list[Record]


def load(name: str, source: str, seed: int) -> Split:
    """Returns a task's data from a folder, or from the hub where `source` is "hub"."""
    train, held_out = _from_hub(name) if source == "hub" else _FOLDERS[name](Path(source))
    valid, test = _halves(name, held_out, seed)
    return Split(train, valid, test)


def _halves(name: str, records: list[Record], seed: int) -> tuple[list[Record], list[Record]]:
    """Splits as the authors' load_glue_data_final does: the same examples for the same seed."""
    order = np.random.RandomState(seed).permutation(len(records)).tolist()
    size = 1000 if name in ("mnli", "qnli", "qqp") else len(records) // 2
    first = [records[i] for i in order[:size]]
    rest = [records[i] for i in order[size:]]
    return (rest, first) if name == "cola" else (first, rest)


def _from_hub(name: str) -> tuple[list[Record], list[Record]]:
    import datasets

    task, data = TASKS[name], datasets.load_dataset("nyu-mll/glue", name)

    def records(split: str) -> list[Record]:
        return [_record([row[t] for t in task.texts], row["label"], task) for row in data[split]]

    return records("train"), records(task.valid)


def _record(texts: list[str], answer: Any, task: GlueTask) -> Record:
    record: Record = {"text": texts[0]}
    if len(texts) == 2:
        record["text_pair"] = texts[1]
    return record | ({"label": str(answer)} if task.labels else {"score": float(answer)})


def _rows(path: Path, *, header: bool) -> Iterator[list[str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        if header:
            next(rows)
        yield from (row for row in rows if row)


def _cola(folder: Path) -> tuple[list[Record], list[Record]]:
    """nyu-mll/CoLA-baselines: GLUE's validation set is both of its dev sets."""

    def records(*names: str) -> list[Record]:
        paths = [folder / "cola" / f"{name}.tsv" for name in names]
        rows = [row for path in paths for row in _rows(path, header=False)]
        return [_record([row[3]], row[1], TASKS["cola"]) for row in rows]

    return records("in_domain_train"), records("in_domain_dev", "out_of_domain_dev")


def _sst2(folder: Path) -> tuple[list[Record], list[Record]]:
    """clairett/pytorch-sentiment-classification: whole sentences, a tenth of GLUE's phrases."""

    def records(name: str) -> list[Record]:
        rows = _rows(folder / "sst2" / f"{name}.tsv", header=False)
        return [_record([text], label, TASKS["sst2"]) for text, label in rows]

    return records("train"), records("dev")


def _mrpc(folder: Path) -> tuple[list[Record], list[Record]]:
    """brmson/dataset-sts: Microsoft's training set, of which 500 pairs are held out."""

    def records(name: str) -> list[Record]:
        rows = _rows(folder / "mrpc" / f"msr-para-{name}.tsv", header=True)
        return [_record([row[3], row[4]], row[0], TASKS["mrpc"]) for row in rows]

    return records("train"), records("val")


def _rte(folder: Path) -> tuple[list[Record], list[Record]]:
    """GLUE's own files; a second part of the training set is in val.tsv."""
    numbers = {"entailment": "0", "not_entailment": "1"}

    def records(name: str, header: bool) -> list[Record]:
        rows = _rows(folder / "rte" / f"{name}.tsv", header=header)
        return [_record(row[1:3], numbers[row[3]], TASKS["rte"]) for row in rows]

    return records("train", True) + records("val", False), records("dev", True)


_FOLDERS: Mapping[str, Callable[[Path], tuple[list[Record], list[Record]]]] = {
    "cola": _cola, "sst2": _sst2, "mrpc": _mrpc, "rte": _rte,
}  # fmt: skip
