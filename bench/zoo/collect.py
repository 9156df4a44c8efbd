"""Puts what the parts have found so far together, as the few files that a run leaves."""

import contextlib
import csv
import io
import json
import tarfile
from pathlib import Path
from typing import Any

from plan import replace_file
from trainings import choose

CURVE_COLUMNS = ("task", "method", "rate", "step", "split", "loss", "accuracy")


def collect(work: Path, out: Path, head: dict[str, Any]) -> None:
    """Writes results.json, curves.csv, outputs.json and adapters.tar into `out`.

    Each is replaced as a whole, so that a run that is killed leaves those of some seconds before.
    """
    runs, curves, base, notes = [], [], {}, {}
    outputs: dict[str, dict[str, list[str]]] = {}
    for path in sorted(work.glob("part-*.json")):
        part = json.loads(path.read_text(encoding="utf-8"))
        runs += part["runs"]
        curves += part["curves"]
        base |= part["base"]
        notes[path.stem.removeprefix("part-")] = part["notes"]
        for task, answers in part["outputs"].items():
            outputs.setdefault(task, {}).update(answers)
    for run in runs:
        run["chosen"] = False
    choose(runs)
    results = head | {"notes": notes, "base": base, "runs": runs}
    replace_file(out / "results.json", json.dumps(results, indent=1, ensure_ascii=False).encode())
    replace_file(out / "outputs.json", json.dumps(outputs, indent=0, ensure_ascii=False).encode())
    text = io.StringIO()
    writer = csv.DictWriter(text, CURVE_COLUMNS)
    writer.writeheader()
    for point in curves:
        writer.writerow(point | {"loss": f"{point['loss']:.5g}"})
    replace_file(out / "curves.csv", text.getvalue().encode())
    if (work / "adapters").is_dir():
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w") as archive, contextlib.suppress(OSError):
            archive.add(work / "adapters", arcname="adapters")
        replace_file(out / "adapters.tar", data.getvalue())
