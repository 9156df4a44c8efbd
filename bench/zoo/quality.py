"""Prints the tables of docs/quality.md of what a run found, and draws its pictures.

    python bench/zoo/quality.py --results results --pictures docs/pictures [--served served.json]

Needs matplotlib.
"""

import argparse
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from found import LORA, Found, label, written
from part_red import ABLATED, ABLATIONS, RATES
from tasks import TASKS

from redmux_bench.plot import panels, save
from redmux_bench.tables import markdown

LORA_RATE = 1e-3
_SECOND = {  # shown beside a task's own metric
    "restaurant": ("food_stated", "near_stated"),
    "assistant-json": ("exact", "intent_accuracy"),
    "booking": ("exact",),
    "router": ("out_of_scope_recall",),
    "entities": ("exact",),
}
_DASHES = {"LoRA r=8": "--", "LoRA r=16": ":"}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--results", type=Path, nargs="+", required=True,
        help="folders that run.py filled; later ones replace trainings of the first",
    )  # fmt: skip
    parser.add_argument("--served", type=Path, help="the JSON file of served.py")
    parser.add_argument("--pictures", type=Path, help="folder for the pictures")
    args = parser.parse_args(argv)
    found = functools.reduce(Found.with_later, map(Found.read, args.results))
    served = json.loads(args.served.read_text(encoding="utf-8"))["tasks"] if args.served else {}
    for title, text in (
        ("Scores", scores(found, served)),
        ("Trainings", trainings(found)),
        ("Held-out loss at the end", final_losses(found)),
        ("Held-out loss at the same step", same_step(found)),
        ("Parts of RED", ablations(found)),
    ):
        print(f"## {title}\n\n{text}\n")
    if args.pictures:
        args.pictures.mkdir(parents=True, exist_ok=True)
        methods = ("RED", "RED++", *LORA)
        draw(found, tasks_of(found), methods, 5, args.pictures / "zoo-curves.png")
        ablated = [task for task in ABLATED if task in tasks_of(found)]
        draw(found, ablated, ("RED", *ABLATIONS), 3, args.pictures / "zoo-ablations.png")


def tasks_of(found: Found) -> list[str]:
    """Returns the tasks of a run in the order in which they are defined."""
    return [task for task in TASKS if task in found.results["base"]]


def scores(found: Found, served: Mapping[str, Any]) -> str:
    """Returns the held-out scores of the base model, RED, RED++ and LoRA that was completed."""
    rows = []
    lora = [m for m in LORA if any(found.completed(task, [m]) for task in tasks_of(found))]
    for task in tasks_of(found):
        base = found.results["base"][task]
        methods = [
            base["zero_shot"], base["few_shot"], base.get("zero_shot_likelihood", {}),
            found.run(task, "RED")["scores"], found.run(task, "RED++")["scores"],
        ]  # fmt: skip
        for method in lora:
            methods.append(next((r["scores"] for r in found.completed(task, [method])), {}))
        if served:
            methods.append(served.get(task, {}).get("scores", {}))
        for score in (TASKS[task].metric, *_SECOND.get(task, ())):
            cells = [written(score, values.get(score)) for values in methods]
            rows.append([task, label(score), str(base["n"]), *cells])
    header = ["task", "score", "n", "base", "base, 3 shots", "base, likeliest label", "RED"]
    header += ["RED++", *lora, *(["bundled, served"] if served else [])]
    return markdown(header, rows, left=2)


def trainings(found: Found) -> str:
    """Returns what each method's trainings took, those that were stopped in rows of their own."""
    rows = []
    order = ("RED", "RED++", *LORA, *ABLATIONS)
    kinds = {(run["method"], run["ending"] == "completed") for run in found.results["runs"]}
    for method, completed in sorted(kinds, key=lambda kind: (order.index(kind[0]), kind[1])):
        runs = [
            run for run in found.results["runs"]
            if (run["method"], run["ending"] == "completed") == (method, completed)
        ]  # fmt: skip
        steps = sorted({run["steps"] for run in runs})
        rows.append([
            method, f"{runs[0]['parameters']:,}", str(len(runs)),
            ", ".join(f"{run:g}" for run in sorted({run["rate"] for run in runs})),
            str(steps[0]) if len(steps) == 1 else f"{steps[0]} to {steps[-1]}",
            f"{sum(run['tokens'] for run in runs):,}",
            f"{sum({run['together_s'] for run in runs}):.0f}",  # once for each pass
        ])  # fmt: skip
    header = ["method", "parameters", "trainings", "rates", "steps", "tokens of all"]
    return markdown([*header, "seconds of all"], rows)


def final_losses(found: Found) -> str:
    """Returns the held-out losses of all methods on tasks where every LoRA was completed."""
    methods = ("RED", "RED++", *LORA)
    rows = [
        [task, *(f"{found.run(task, method)['valid_loss']:.3f}" for method in methods)]
        for task in tasks_of(found) if len(found.completed(task, LORA)) == len(LORA)
    ]  # fmt: skip
    return markdown(["task", *methods], rows)


def same_step(found: Found) -> str:
    """Returns the held-out losses of all methods at the last evaluation of each stopped LoRA."""
    rows = []
    methods = [(m, rate) for m in ("RED", "RED++") for rate in RATES]
    methods += [(m, LORA_RATE) for m in LORA]
    for task in tasks_of(found):
        curves = [found.curve(task, method, rate) for method, rate in methods]
        completed = {run["method"] for run in found.completed(task, LORA)}
        stopped = [m for m in LORA if m not in completed]
        judged = {max(found.curve(task, m, LORA_RATE), default=0) for m in stopped}
        for step in sorted(judged - {0}):
            cells = (f"{curve[step]:.3f}" if step in curve else "-" for curve in curves)
            rows.append([task, str(step), *cells])
    used = [i for i in range(len(methods)) if any(row[2 + i] != "-" for row in rows)]
    header = [f"{methods[i][0]}, {methods[i][1]:g}" for i in used]
    kept = [[*row[:2], *(row[2 + i] for i in used)] for row in rows]
    return markdown(["task", "step", *header], kept)


def ablations(found: Found) -> str:
    """Returns the held-out losses of RED and its parts at the last step that all have."""
    rows = []
    for task in (t for t in ABLATED if t in found.results["base"]):
        rate = found.run(task, "RED")["rate"]
        methods = [m for m in ("RED", *ABLATIONS) if found.curve(task, m, rate)]
        curves = [found.curve(task, method, rate) for method in methods]
        step = max(set.intersection(*(set(curve) for curve in curves)))
        for method, curve in zip(methods, curves, strict=True):
            run, score = found.run(task, method), TASKS[task].metric
            name = "RED (ffn, both)" if method == "RED" else method
            rows.append([
                task, name, f"{run['parameters']:,}", f"{curve[step]:.3f} (step {step})",
                f"{label(score)} {written(score, run['scores'][score])} (step {run['best_step']})",
            ])  # fmt: skip
    return markdown(
        ["task", "what is trained", "parameters", "held-out loss", "score"], rows, left=2
    )


def draw(
    found: Found, tasks: Sequence[str], methods: Sequence[str], num_columns: int, file: Path
) -> None:
    """Draws the held-out losses of methods, one small picture per task."""
    num_rows = -(-len(tasks) // num_columns)
    figure, grid = panels(num_rows, num_columns, (11, 2.6 * num_rows))
    for task, axes in zip(tasks, grid, strict=False):
        for method in methods:
            curve = found.curve(task, method, found.run(task, method)["rate"])
            steps = sorted(set(curve) - {0})  # step 0 would flatten all that comes behind it
            axes.plot(steps, [curve[step] for step in steps], _DASHES.get(method, "-"),
                      marker=".", label=method)  # fmt: skip
        axes.tick_params(labelsize=8)
        axes.set_title(task, fontsize=9)
    grid[0].legend(fontsize=7)
    figure.supxlabel("step", fontsize=9)
    figure.supylabel("held-out loss", fontsize=9)
    save(figure, file, dpi=75)


if __name__ == "__main__":
    main()
