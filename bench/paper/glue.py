"""Trains RED adapters on GLUE tasks in shared passes, serves them, and scores what is served.

python bench/paper/glue.py --model roberta-base --data hub --recipe roberta-base --device cuda \
    --tasks sst2,cola,mrpc,rte --work glue --out glue.json
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from glue_data import TASKS, Record, Split, load
from glue_metrics import score

from redmux import Client
from redmux_adapters import read_adapter
from redmux_adapters.train.cli import main as train
from redmux_adapters.train.job import read_job
from redmux_bench import report
from redmux_bench.server_process import ServerProcess

_INPUTS_PER_CALL = 64


def main() -> int:
    """Runs the recipe; an interrupted run goes on where it was."""
    options = _arguments()
    tasks, methods = options.tasks.split(","), options.methods.split(",")
    splits = {name: load(name, options.data, options.seed) for name in tasks}
    work = Path(options.work)
    work.mkdir(parents=True, exist_ok=True)
    job = work / "job.json"
    description = json.dumps(_job(options, splits, methods), indent=1)
    if job.exists() and job.read_text() != description:
        sys.exit(f"{work} holds a run of other options; give another --work")
    for name, split in splits.items():
        for part in ("train", "valid"):
            lines = map(json.dumps, getattr(split, part))
            (work / f"{name}.{part}.jsonl").write_text("\n".join(lines) + "\n")
    job.write_text(description)
    folders = _folders(job)
    if not all((folder / "adapter_config.json").exists() for folder in folders.values()):
        threads = ["--threads", str(options.threads)] if options.threads else []
        if train(["--job", str(job), "--resume", *threads]):
            return 1
    rows = [*_majority(splits), *_serve(options, splits, methods, folders)]
    report.print_table(
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
    run = {key: getattr(options, key) for key in ("recipe", "seed", "steps", "command_line")}
    result = {"model": Path(options.model).name, **run, "machine": report.machine(), "rows": rows}
    Path(options.out).write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="an encoder: a folder, or a name on the hub")
    parser.add_argument("--data", required=True, help='folder of the data sets, or "hub"')
    parser.add_argument("--tasks", default="sst2,cola,mrpc,rte", help=f"of {', '.join(TASKS)}")
    parser.add_argument("--methods", default="red,redpp,head", help="of recipes.toml")
    parser.add_argument("--recipe", default="minilm", help="a model under [glue] in recipes.toml")
    parser.add_argument("--steps", type=int, help="optimizer steps, instead of the recipe's epochs")
    parser.add_argument("--seed", type=int, default=42, help="of the split, the order, the head")
    parser.add_argument("--work", default="glue", help="folder for the run and its adapters")
    parser.add_argument("--out", default="glue.json", help="file for the results")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="of training; 0: torch's choice")
    options = parser.parse_args()
    options.command_line = " ".join(["glue.py", *sys.argv[1:]])
    return options


def _job(
    options: argparse.Namespace, splits: Mapping[str, Split], methods: Sequence[str]
) -> dict[str, Any]:
    """Returns the job file of `redmux train`: every task with every method."""
    recipes = tomllib.loads(Path(__file__).with_name("recipes.toml").read_text())
    recipe = recipes["glue"][options.recipe]
    tasks = []
    for name, split in splits.items():
        for method in methods:
            values = {**recipe["options"], **recipe.get(name, {}), **recipes["methods"][method]}
            values |= recipe.get(method, {}).get(name, {})
            per_epoch = -(-len(split.train) // values["batch_size"])
            values["eval_every"] = per_epoch
            if options.steps:
                every = min(per_epoch, -(-options.steps // 2))
                values |= {"steps": options.steps, "eval_every": every}
            tasks.append({
                "name": f"{name}-{method}", "data": f"{name}.train.jsonl",
                "valid": f"{name}.valid.jsonl", "seed": options.seed,
                **({"labels": TASKS[name].labels, "metric": "accuracy"} if TASKS[name].labels
                   else {"metric": "loss"}),
                **values,
            })  # fmt: skip
    run = {"base": options.model, "device": options.device, "checkpoint_every": 10}
    return {**run, "output": "adapters", "tasks": tasks}


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


def _folders(job: Path) -> dict[str, Path]:
    """Returns where the adapter of each task of a job file is, or will be."""
    described = read_job(job, {})
    return {task.name: described.folder(task.name) for task in described.tasks}


def _serve(
    options: argparse.Namespace,
    splits: Mapping[str, Split],
    methods: Sequence[str],
    folders: Mapping[str, Path],
) -> list[dict[str, Any]]:
    """Returns the scores of every adapter's answers, as a server gives them to a client."""
    flags = ["--model", options.model, "--max-running", str(_INPUTS_PER_CALL)]
    if options.threads:
        flags += ["--threads", str(options.threads)]
    rows = []
    with ServerProcess(*flags) as server, Client(server.address) as client:
        for name, split in splits.items():
            for method in methods:
                adapter = f"{name}-{method}"
                client.adapters.put(adapter, folders[adapter])
                halves = (split.valid, split.test)
                answers = (_classify(client, adapter, half) for half in halves)
                row = _row(name, method, split, *answers)
                if method != "head":
                    edits = read_adapter(folders[adapter]).edits.values()
                    row["values"] = sum(2 * edit.scale.numel() for edit in edits)
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
        counted = [
            float(line["accuracy"])
            for line in csv.DictReader(file)
            if line["task"] == task and line["split"] == "valid"
        ]
    return round(max(counted) * row["num_valid"]) == round(
        row["valid"]["accuracy"] / 100 * row["num_valid"]
    )


if __name__ == "__main__":
    sys.exit(main())
