"""Draws a run's report: throughput by number of adapters, and by engine at each concurrency.

Writes OUT/adapters.png and OUT/engines.png. Needs matplotlib, which redmux does not.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from table import Key, rates

from redmux_bench.plot import label, panels, save

RATES = "output tokens per second, median and range"
Found = Mapping[Key, Mapping[int, float]]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("report", type=Path, help="the JSON file of run.py")
    parser.add_argument("out", type=Path, help="folder for the pictures")
    args = parser.parse_args(argv)
    report = json.loads(args.report.read_text())
    found = rates(report)
    args.out.mkdir(parents=True, exist_ok=True)
    save(draw_adapters(report, found), args.out / "adapters.png")
    save(draw_engines(report, found), args.out / "engines.png")


def draw_adapters(report: Mapping[str, Any], found: Found) -> Any:
    """Lines: output tokens per second against the number of distinct adapters in the wave."""
    keys = [key for key in found if key[1] == "adapters"]
    most = max(key[2] for key in keys)
    # One concurrency throughout where --distinct varied the adapters; else both grow together.
    fixed = [key for key in keys if key[2] == most]
    is_fixed = len({key[3] for key in fixed}) > 1
    keys = fixed if is_fixed else keys
    figure, (axes,) = panels(1, 1, (7, 4.5), title(report))
    for name in report["peers"]:
        points = sorted((key[3], found[key]) for key in keys if key[0] == name)
        if points:
            counts = [count for count, _ in points]
            middle, spread = summaries([values for _, values in points])
            axes.errorbar(counts, middle, spread, marker="o", capsize=3, label=name)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    requests = f"{most} requests at once" if is_fixed else "as many requests at once"
    label(axes, f"distinct adapters ({requests})", RATES)
    axes.legend(fontsize="small", ncols=2)
    return figure


def draw_engines(report: Mapping[str, Any], found: Found) -> Any:
    """Bars: every engine and workload, a group of bars per concurrency."""
    concurrencies = sorted({key[2] for key in found})
    rows = [
        (name, workload)
        for workload in ("base", "adapters")
        for name, facts in report["peers"].items()
        if workload in facts["workloads"]
    ]
    figure, (axes,) = panels(1, 1, (9, 4.5), title(report))
    width = 0.8 / len(rows)
    for i, (name, workload) in enumerate(rows):
        values = [
            found[name, workload, c, c if workload == "adapters" else 0] for c in concurrencies
        ]
        middle, spread = summaries(values)
        places = [group + (i - (len(rows) - 1) / 2) * width for group in range(len(concurrencies))]
        axes.bar(
            places, middle, width, yerr=spread, capsize=2, label=f"{name}, {workload}",
            hatch="//" if workload == "adapters" else None, edgecolor="white", color=f"C{i % 10}",
        )  # fmt: skip
    axes.set_xticks(range(len(concurrencies)), [str(c) for c in concurrencies])
    label(axes, "requests at once (adapters: each request its own)", RATES)
    axes.legend(fontsize="small", ncols=2)
    return figure


def summaries(rows: Sequence[Mapping[int, float]]) -> tuple[list[float], list[list[float]]]:
    """Returns the medians, and how far the lowest and highest values lie from them."""
    middle = [median(row.values()) for row in rows]
    below = [m - min(row.values()) for m, row in zip(middle, rows, strict=True)]
    above = [max(row.values()) - m for m, row in zip(middle, rows, strict=True)]
    return middle, [below, above]


def title(report: Mapping[str, Any]) -> str:
    machine = report["machine"]
    return (
        f"SmolLM2-135M, {report['prompt_tokens']} + {report['output_tokens']} tokens, "
        f"{machine['cores']} cores {machine['cpu'].split(' (')[0]}"
    )


if __name__ == "__main__":
    main()
