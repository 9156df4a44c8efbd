"""The report of a run as a markdown table."""

from collections import defaultdict
from collections.abc import Mapping
from statistics import median
from typing import Any

from redmux_bench.rounds import median_ratio
from redmux_bench.tables import markdown

Key = tuple[str, str, int, int]
"""Engine, workload, concurrency, distinct adapters."""


def rates(report: Mapping[str, Any]) -> dict[Key, dict[int, float]]:
    """Returns tokens per second by round for every kind of wave."""
    found: dict[Key, dict[int, float]] = defaultdict(dict)
    for wave in report["waves"]:
        key = (wave["peer"], wave["workload"], wave["concurrency"], wave["distinct"])
        found[key][wave["round"]] = wave["tokens_per_s"]
    return found


def summary(report: Mapping[str, Any]) -> str:
    """Returns a table for each workload: a row per engine, a column per load."""
    found = rates(report)
    reference = report["reference"]
    lines: list[str] = []
    for workload in ("base", "adapters"):
        columns = sorted({key[2:] for key in found if key[1] == workload})
        if not columns:
            continue
        headings = [
            f"{concurrency} at once" + (f", {distinct} adapters" if distinct else "")
            for concurrency, distinct in columns
        ]
        rows = []
        for name, facts in report["peers"].items():
            if workload not in facts["workloads"]:
                continue
            cells = [
                cell(found[name, workload, *column], found.get((reference, workload, *column)))
                for column in columns
            ]
            memory = max(w["memory_mb"] for w in report["waves"] if w["peer"] == name)
            rows.append([name, *cells, str(memory)])
        lines += [
            f"\n{workload}: output tokens per second, median (lowest to highest), "
            f"ratio to {reference} within the round\n",
            markdown(["engine", *headings, "memory, MB"], rows),
        ]
    foreign = [wave["foreign_cores"] for wave in report["waves"]]
    lines.append(
        f"\nCores taken by other processes during the waves: median {median(foreign):.2f}, "
        f"most {max(foreign):.2f}."
    )
    return "\n".join(lines)


def cell(own: Mapping[int, float], reference: Mapping[int, float] | None) -> str:
    """Returns "median (lowest to highest), ratio", the last where the reference ran, too."""
    values = own.values()
    text = f"{median(values):.1f} ({min(values):.1f} to {max(values):.1f})"
    if not reference:
        return text
    within = median_ratio(list(values), [reference[number] for number in own])
    return f"{text}, {within:.2f}"
