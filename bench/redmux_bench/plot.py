"""Figures of results, drawn without a display."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

if TYPE_CHECKING:
    from redmux_bench.serve import Load
    from redmux_bench.summary import Summary
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


def plot_latencies(pairs: "Sequence[tuple[Load, Summary]]", model: str, file: str) -> None:
    """Draws the time to the first token and between tokens against the load into a PNG.

    The load is the rate of arrivals where there is one, else how many requests are open.
    """
    figure, panels = plt.subplots(1, 2, figsize=(9, 4), layout="constrained", sharex=True)
    figure.suptitle(model)
    loads = [load.rate or load.concurrency for load, _ in pairs]
    is_rate = pairs[0][0].rate is not None
    for axes, name, title in zip(
        panels, ("time_to_first_token_ms", "inter_token_ms"), ("first token", "between tokens"),
        strict=True,
    ):  # fmt: skip
        found = [getattr(summary, name) for _, summary in pairs]
        for part in ("p50", "p90", "p99"):
            values = [getattr(x, part) if x else float("nan") for x in found]
            axes.plot(loads, values, marker="o", label=part)
        axes.set_xscale("log", base=2)
        axes.set_xticks(loads, [f"{load:g}" for load in loads])
        axes.set_ylim(bottom=0)
        axes.set_xlabel("requests per second" if is_rate else "requests at a time")
        axes.set_ylabel(f"{title}, ms")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(file, dpi=150)
    plt.close(figure)
