"""What the recipes share: their options, the training of a job, its server, the file of results."""

import argparse
import json
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from redmux_adapters import read_adapter
from redmux_adapters.train.cli import main as train
from redmux_adapters.train.job import read_job
from redmux_bench.machine import machine
from redmux_bench.server_process import ServerProcess

RECIPES: Mapping[str, Any] = tomllib.loads(Path(__file__).with_name("recipes.toml").read_text())


def parser_of(
    doc: str, name: str, *, model: str | None, recipe: str, methods: str
) -> argparse.ArgumentParser:
    """Returns a parser of the options that every recipe has, with these defaults."""
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    parser.add_argument(
        "--model", required=model is None, default=model,
        help="as redmux serve takes it: a folder, or a name on the hub",
    )  # fmt: skip
    parser.add_argument("--recipe", default=recipe, help=f"a model under [{name}] in recipes.toml")
    parser.add_argument("--methods", default=methods, help="of recipes.toml")
    parser.add_argument("--steps", type=int, help="optimizer steps, instead of the recipe's epochs")
    parser.add_argument("--seed", type=int, default=42, help="of all that is drawn")
    parser.add_argument("--work", default=name, help="folder for the run, its adapters and texts")
    parser.add_argument("--out", default=f"{name}.json", help="file for the results")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="of training; 0: torch's choice")
    return parser


def train_all(
    options: argparse.Namespace,
    tasks: Sequence[Mapping[str, Any]],
    records: Mapping[str, Iterable[Mapping[str, Any]]],
) -> dict[str, Path]:
    """Trains the tasks of a job whose files hold these records; an interrupted run goes on.

    Returns the adapters' folders by task. Exits where that cannot be.
    """
    work = Path(options.work)
    work.mkdir(parents=True, exist_ok=True)
    job = work / "job.json"
    run = {"base": options.model, "device": options.device, "checkpoint_every": 10}
    description = json.dumps({**run, "output": "adapters", "tasks": tasks}, indent=1)
    if job.exists() and job.read_text() != description:
        sys.exit(f"{work} holds a run of other options; give another --work")
    for name, part in records.items():
        (work / name).write_text("\n".join(map(json.dumps, part)) + "\n")
    job.write_text(description)
    described = read_job(job, {})
    folders = {task.name: described.folder(task.name) for task in described.tasks}
    if not all((folder / "adapter_config.json").exists() for folder in folders.values()):
        threads = ["--threads", str(options.threads)] if options.threads else []
        if train(["--job", str(job), "--resume", *threads]):
            sys.exit(1)
    return folders


def server(options: argparse.Namespace, max_running: int) -> ServerProcess:
    """Returns a server of the recipe's model, to be entered."""
    threads = ["--threads", str(options.threads)] if options.threads else []
    return ServerProcess("--model", options.model, "--max-running", str(max_running), *threads)


def num_values(folder: Path) -> int:
    """Returns how many values an adapter has trained, its head's not counted."""
    return sum(2 * edit.scale.numel() for edit in read_adapter(folder).edits.values())


def write_results(file: str, rows: Sequence[Mapping[str, Any]], **about: Any) -> None:
    """Writes the rows, the command and the machine, and what else is to be known of the run."""
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    result = {"command_line": command, "machine": machine(), **about, "rows": rows}
    Path(file).write_text(json.dumps(result, indent=1) + "\n")


def about(options: argparse.Namespace) -> dict[str, Any]:
    """Returns what of the options belongs to the results of a recipe."""
    run = {key: getattr(options, key) for key in ("recipe", "seed", "steps")}
    return {"model": Path(options.model).name, **run}
