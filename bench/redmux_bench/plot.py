"""Figures of results, drawn without a display."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

if TYPE_CHECKING:
    from redmux_bench.sweep import SweepRow


def plot_sweep(rows: "Sequence[SweepRow]", concurrency: int, model: str, file: str) -> None:
    """Draws throughput against the number of adapters, with every round as a dot, into a PNG."""
    ordered = sorted(rows, key=lambda row: row.adapters)
    places = range(len(ordered))  # evenly spaced: 0 and powers of two share no other scale
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(places, [row.output_tokens_per_s for row in ordered], marker="o", label="median")
    for place, row in zip(places, ordered, strict=True):
        axes.scatter([place] * len(row.rounds), row.rounds, s=8, color="grey")
    axes.set_xticks(places, [str(row.adapters) for row in ordered])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("distinct adapters")
    axes.set_ylabel("output tokens per second")
    axes.set_title(f"{model}, {concurrency} requests at a time")
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(file, dpi=150)
    plt.close(figure)
