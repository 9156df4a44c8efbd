"""What a run left in its folder, as the cards and tables need it."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Curve = dict[int, float]  # held-out loss by step

# Score -> how it is called, and whether it is a share.
_SCORES: dict[str, tuple[str, bool]] = {
    "bleu": ("BLEU", False),
    "name_stated": ("name stated", True),
    "food_stated": ("food stated", True),
    "near_stated": ("place nearby stated", True),
    "area_stated": ("area stated", True),
    "familyFriendly_stated": ("family friendliness stated and right", True),
    "exact": ("exact object", True),
    "slot_f1": ("slot F1", False),
    "intent_accuracy": ("intent accuracy", True),
    "valid_json": ("valid JSON", True),
    "accuracy": ("accuracy", True),
    "out_of_scope_recall": ("out of scope recognised", True),
    "three_marks": ("answers with 3 or more forms of the style", True),
    "marks_per_100_words": ("forms of the style per 100 words", False),
    "content_recall": ("words of the plain answer found", True),
    "gleu": ("GLEU", False),
    "changed": ("sentences changed", True),
}


def score_names(scores: Mapping[str, float]) -> list[str]:
    """Returns the scores of a task in the order in which they are shown."""
    return [name for name in _SCORES if name in scores]


def label(score: str) -> str:
    """Returns how a score is called in tables."""
    return _SCORES[score][0]


def written(score: str, value: float | None) -> str:
    """Returns a score as it stands in tables, a dash for none."""
    if value is None:
        return "-"
    if _SCORES[score][1]:
        return f"{100 * value:.0f} %"
    return f"{value:.2f}" if score == "slot_f1" else f"{value:.1f}"


@dataclass(frozen=True)
class Found:
    """The results, losses and answers of a run."""

    results: Mapping[str, Any]
    points: Sequence[Mapping[str, str]]
    outputs: Mapping[str, Mapping[str, list[str]]]

    @classmethod
    def read(cls, folder: Path) -> "Found":
        """Reads what `collect` wrote."""
        with (folder / "curves.csv").open(encoding="utf-8") as lines:
            points = list(csv.DictReader(lines))
        values = [
            json.loads((folder / name).read_text(encoding="utf-8"))
            for name in ("results.json", "outputs.json")
        ]
        return cls(values[0], points, values[1])

    def run(self, task: str, method: str) -> dict[str, Any]:
        """Returns the training whose rate was chosen; KeyError if there is none."""
        runs: list[dict[str, Any]] = self.results["runs"]
        for run in runs:
            if (run["task"], run["method"]) == (task, method) and run["chosen"]:
                return run
        raise KeyError(f"no training of {method} on {task}")

    def rates(self, task: str, method: str) -> list[float]:
        """Returns the rates that were tried."""
        rows = (r for r in self.results["runs"] if (r["task"], r["method"]) == (task, method))
        return sorted(row["rate"] for row in rows)

    def curve(self, task: str, method: str, rate: float, split: str = "valid") -> Curve:
        """Returns the losses of a training by step; empty if there was none."""
        return {
            int(point["step"]): float(point["loss"])
            for point in self.points
            if (point["task"], point["method"], point["split"]) == (task, method, split)
            and float(point["rate"]) == rate
        }


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Returns a Markdown table whose columns but the first `left` are numbers."""
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    lines = [" | ".join(header), "|".join(rule), *(" | ".join(row) for row in rows)]
    lines[1:2] = [f"|{lines[1]}|"]
    return "\n".join(line if line.startswith("|--") else f"| {line} |" for line in lines)
