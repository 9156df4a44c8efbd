"""Figures of results, drawn without a display."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Row = Mapping[str, Any]


def panels(
    num_rows: int, num_columns: int, size: tuple[float, float], title: str = ""
) -> tuple[Any, Sequence[Any]]:
    """Returns a figure of inches `size` and its empty axes, row by row."""
    figure, axes = plt.subplots(
        num_rows, num_columns, figsize=size, layout="constrained", squeeze=False
    )
    if title:
        figure.suptitle(title)
    return figure, axes.flatten().tolist()


def label(axes: Any, x: str, y: str) -> None:
    """Names the axes; heights begin at 0 and have lines to read them by."""
    axes.set_ylim(bottom=0)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(axis="y", alpha=0.3)


def save(figure: Any, file: str | Path, dpi: int = 150) -> None:
    """Writes a PNG and lets the figure go."""
    figure.savefig(file, dpi=dpi)
    plt.close(figure)


def plot_sweep(rows: Sequence[Row], concurrency: int, model: str, file: str) -> None:
    """Draws throughput against the number of adapters, with every round as a dot, into a PNG."""
    ordered = sorted(rows, key=lambda row: int(row["adapters"]))
    places = range(len(ordered))  # evenly spaced: 0 and powers of two share no other scale
    figure, (axes,) = panels(1, 1, (7, 4), f"{model}, {concurrency} requests at a time")
    axes.plot(places, [row["output_tokens_per_s"] for row in ordered], marker="o", label="median")
    for place, row in zip(places, ordered, strict=True):
        axes.scatter([place] * len(row["rounds"]), row["rounds"], s=8, color="grey")
    axes.set_xticks(places, [str(row["adapters"]) for row in ordered])
    label(axes, "distinct adapters", "output tokens per second")
    save(figure, file)


def plot_latencies(rows: Sequence[Row], model: str, file: str) -> None:
    """Draws the time to the first token and between tokens against the load into a PNG.

    The load is the rate of arrivals where there is one, else how many requests are open.
    """
    figure, both = panels(1, 2, (9, 4), model)
    loads = [row["rate"] or row["concurrency"] for row in rows]
    kind = "requests per second" if rows[0]["rate"] else "requests at a time"
    names = {"time_to_first_token_ms": "first token, ms", "inter_token_ms": "between tokens, ms"}
    for axes, (name, title) in zip(both, names.items(), strict=True):
        for part in ("p50", "p90", "p99"):
            values = [row[name][part] if row[name] else float("nan") for row in rows]
            axes.plot(loads, values, marker="o", label=part)
        axes.set_xscale("log", base=2)
        axes.set_xticks(loads, [f"{load:g}" for load in loads])
        label(axes, kind, title)
        axes.legend()
    save(figure, file)
