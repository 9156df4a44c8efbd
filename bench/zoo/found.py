"""What a run left in its folder, as the tables need it."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Curve = dict[int, float]  # held-out loss by step
LORA = ("LoRA r=8", "LoRA r=16")

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
    """The results and losses of a run."""

    results: Mapping[str, Any]
    points: Sequence[Mapping[str, str]]

    @classmethod
    def read(cls, folder: Path) -> "Found":
        """Reads what `collect` wrote."""
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        with (folder / "curves.csv").open(encoding="utf-8") as lines:
            return cls(results, list(csv.DictReader(lines)))

    def with_later(self, later: "Found") -> "Found":
        """Returns this with the trainings of a later run in place of the same ones here.

        What is not trained, such as the base model's scores, stays as it is here.
        """
        runs = later.results["runs"]
        ours = [r for r in self.results["runs"] if _key(r) not in {_key(run) for run in runs}]
        keys = {(task, method, f"{rate:g}") for task, method, rate in map(_key, runs)}
        points = [p for p in self.points if (p["task"], p["method"], p["rate"]) not in keys]
        return Found({**self.results, "runs": [*ours, *runs]}, [*points, *later.points])

    def run(self, task: str, method: str) -> dict[str, Any]:
        """Returns the training whose rate was chosen; KeyError if there is none."""
        runs: list[dict[str, Any]] = self.results["runs"]
        for run in runs:
            if (run["task"], run["method"]) == (task, method) and run["chosen"]:
                return run
        raise KeyError(f"no training of {method} on {task}")

    def completed(self, task: str, methods: Sequence[str]) -> list[dict[str, Any]]:
        """Returns the chosen trainings of these methods that took all of their steps."""
        return [
            run for method in methods for run in self.results["runs"]
            if (run["task"], run["method"]) == (task, method)
            and run["chosen"] and run["ending"] == "completed"
        ]  # fmt: skip

    def curve(self, task: str, method: str, rate: float) -> Curve:
        """Returns the held-out losses of a training by step; empty if there was none."""
        return {
            int(point["step"]): float(point["loss"])
            for point in self.points
            if (point["task"], point["method"], point["split"]) == (task, method, "valid")
            and float(point["rate"]) == rate
        }


def _key(run: Mapping[str, Any]) -> tuple[str, str, float]:
    return run["task"], run["method"], run["rate"]
