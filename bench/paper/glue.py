"""Trains RED adapters on GLUE tasks in shared passes, serves them, and scores what is served.

python bench/paper/glue.py --model roberta-base --data hub --recipe roberta-base --device cuda \
    --tasks sst2,cola,mrpc,rte --work glue --out glue.json
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from glue_data import TASKS, Record, Split, load
from glue_metrics import score
from recipe import RECIPES, about, num_values, parser_of, server, train_all, write_results

from redmux import Client
from redmux_bench.tables import print_table

_INPUTS_PER_CALL = 64


def main() -> int:
    """Runs the recipe; an interrupted run goes on where it was."""
    parser = parser_of(__doc__, "glue", model=None, recipe="minilm", methods="red,redpp,head")
    parser.add_argument("--data", required=True, help='folder of the data sets, or "hub"')
    parser.add_argument("--tasks", default="sst2,cola,mrpc,rte", help=f"of {', '.join(TASKS)}")
    options = parser.parse_args()
    methods = options.methods.split(",")
    splits = {name: load(name, options.data, options.seed) for name in options.tasks.split(",")}
    records = {
        f"{name}.{part}.jsonl": getattr(split, part)
        for name, split in splits.items()
        for part in ("train", "valid")
    }
    folders = train_all(options, _tasks(options, splits, methods), records)
    rows = [*_majority(splits), *_serve(options, splits, methods, folders)]
    print_table(
        ("task", "method", "values", "metric", "validation", "test", "n", "as trained"),
        [
            (
                r["task"], r["method"], f"{r['values']:,}", metric,
                f"{r['valid'][metric]:.1f}", f"{r['test'][metric]:.1f}", r["num_test"],
                r["as_trained"],
            )
            for r in rows
            for metric in r["test"]
        ],
    )  # fmt: skip
    write_results(options.out, rows, **about(options))
    return 0


def _tasks(
    options: argparse.Namespace, splits: Mapping[str, Split], methods: Sequence[str]
) -> list[dict[str, Any]]:
    """Returns the tasks of the job: every GLUE task with every method."""
    recipe = RECIPES["glue"][options.recipe]
    tasks = []
    for name, split in splits.items():
        for method in methods:
            values = {**recipe["options"], **recipe.get(name, {}), **RECIPES["methods"][method]}
            values |= recipe.get(method, {}).get(name, {})
            per_epoch = -(-len(split.train) // values["batch_size"])
            values["eval_every"] = per_epoch
            if options.steps:
                every = min(per_epoch, -(-options.steps // 2))
                values |= {"steps": options.steps, "eval_every": every}
            tasks.append({
                "name": f"{name}-{method}", "data": f"{name}.train.jsonl",
                "valid": f"{name}.valid.jsonl", "seed": options.seed,
                **({"labels": TASKS[name].labels} if TASKS[name].labels else {}),
                "metric": TASKS[name].metrics[0], **values,
            })  # fmt: skip
    return tasks


def _majority(splits: Mapping[str, Split]) -> list[dict[str, Any]]:
    """Returns what the most frequent label would score: what learning nothing gives."""
    rows = []
    for name, split in splits.items():
        if TASKS[name].labels:
            labels = [str(record["label"]) for record in split.train]
            answer = float(max(TASKS[name].labels, key=labels.count))
            answers = [answer] * len(split.valid), [answer] * len(split.test)
            rows.append(_row(name, "majority", split, *answers))
    return rows


def _serve(
    options: argparse.Namespace,
    splits: Mapping[str, Split],
    methods: Sequence[str],
    folders: Mapping[str, Path],
) -> list[dict[str, Any]]:
    """Returns the scores of every adapter's answers, as a server gives them to a client."""
    rows = []
    with server(options, _INPUTS_PER_CALL) as process, Client(process.address) as client:
        for name, split in splits.items():
            for method in methods:
                adapter = f"{name}-{method}"
                client.adapters.put(adapter, folders[adapter])
                halves = (split.valid, split.test)
                answers = (_classify(client, adapter, half) for half in halves)
                row = _row(name, method, split, *answers)
                if method != "head":
                    row["values"] = num_values(folders[adapter])
                metrics = Path(options.work) / "adapters" / "metrics.csv"
                row["as_trained"] = _is_as_trained(metrics, adapter, row)
                rows.append(row)
    return rows


def _classify(client: Client, adapter: str, records: Sequence[Record]) -> list[float]:
    inputs = [(r["text"], r["text_pair"]) if "text_pair" in r else r["text"] for r in records]
    answers = []
    for start in range(0, len(inputs), _INPUTS_PER_CALL):
        part = inputs[start : start + _INPUTS_PER_CALL]
        results = client.classify(part, adapter=adapter).results
        answers += [r.logits[0] if r.label == "score" else float(r.label) for r in results]
    return answers


def _row(
    name: str, method: str, split: Split, valid: Sequence[float], test: Sequence[float]
) -> dict[str, Any]:
    """Returns the scores of a method's answers to both halves."""
    row: dict[str, Any] = {"task": name, "method": method, "values": 0, "as_trained": None}
    key = "label" if TASKS[name].labels else "score"
    for part, answers in (("valid", valid), ("test", test)):
        right = [float(record[key]) for record in getattr(split, part)]
        row[part] = {metric: score(metric, answers, right) for metric in TASKS[name].metrics}
        row[f"num_{part}"] = len(right)
    return row


def _is_as_trained(metrics: Path, task: str, row: Mapping[str, Any]) -> bool | None:
    """Whether the server was right as often on the validation half as the trainer had counted."""
    if "accuracy" not in row["valid"]:
        return None
    with metrics.open(newline="") as file:
        lines = [
            line
            for line in csv.DictReader(file)
            if line["task"] == task and line["split"] == "valid"
        ]
    # The first of the best, as the trainer keeps it.
    best = max(lines, key=lambda line: float(line["correlation"] or line["accuracy"]))
    return round(float(best["accuracy"]) * row["num_valid"]) == round(
        row["valid"]["accuracy"] / 100 * row["num_valid"]
    )


if __name__ == "__main__":
    sys.exit(main())
