"""`redmux bench products`: the matrix products of all layers alone, at several numbers of rows."""

import argparse
import copy
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numba
import torch

from redmux import InvalidArgumentError
from redmux_adapters.bases.architectures import LLAMA_LIKE
from redmux_adapters.bases.load import DEFAULT_MODEL, resolve
from redmux_bench import report
from redmux_bench.rounds import in_turn, median_ratio
from redmux_bench.tables import print_table
from redmux_server.models.cpu import aligned
from redmux_server.models.cpu.packed_linear import products
from redmux_server.models.cpu.packing import Packing
from redmux_server.models.cpu.reservation import product_shapes
from redmux_server.models.cpu.tile_permission import why_no_tiles

Row = dict[str, Any]
_BEHIND = 16  # bytes behind a line, where NumPy starts its arrays


def run(options: argparse.Namespace) -> int:
    """Measures products of random weights in the shapes of the model, in this process."""
    if options.threads:
        numba.set_num_threads(min(options.threads, numba.config.NUMBA_NUM_THREADS))
    name = options.model or DEFAULT_MODEL
    shapes = product_shapes(Path(resolve(name)))
    if shapes is None:
        raise InvalidArgumentError(
            f"the products of {name} are not known from its config.json; name one of the "
            f"architectures {', '.join(LLAMA_LIKE)}"
        )
    packings = [_packing(shapes[:-1], precision) for precision in options.precision]
    starts = (0, _BEHIND) if options.unaligned else (0,)
    kinds = [(packing, behind) for packing in packings for behind in starts]
    placed = [_moved(packing, behind) if behind else packing for packing, behind in kinds]
    rows: list[Row] = []
    with report.progress(len(options.rows), "count") as bar:
        for count in options.rows:
            rows += _rows(kinds, placed, count, options.rounds)
            bar.update()
    tiles = why_no_tiles()
    print(f"threads: {numba.get_num_threads()}; tiles: {tiles or 'AMX'}")
    print_table(
        ("precision", "rows", "starts at a line", "ms", "best ms", "to aligned"),
        [
            (r["precision"], r["rows"], "yes" if r["aligned"] else "no", r["ms"], r["best_ms"],
             r.get("over_aligned"))
            for r in rows
        ],
    )  # fmt: skip
    report.write_json(
        options, name,
        {"rows": rows, "threads": numba.get_num_threads(), "tiles": tiles is None},
    )  # fmt: skip
    return 0


def _packing(shapes: Sequence[tuple[int, int]], precision: str) -> Packing:
    """Returns random weights of these shapes; layers of one shape have the same ones."""
    packing = Packing(shapes, precision)
    generator = torch.Generator().manual_seed(0)
    weights = {shape: torch.randn(shape, generator=generator) for shape in sorted({*shapes})}
    for i, shape in enumerate(shapes):
        packing.fill(i, weights[shape], None)
    return packing


def _moved(packing: Packing, behind: int) -> Packing:
    """Returns a copy whose arrays start `behind` bytes behind a line."""
    moved, packed = copy.copy(packing), packing.packed
    names = ("panels", "bias", "scale", "firsts")
    copies: dict[str, Any] = {n: aligned.copied(getattr(packed, n), behind) for n in names}
    moved.packed = packed._replace(**copies)
    return moved


def _rows(
    kinds: Sequence[tuple[Packing, int]], placed: Sequence[Packing], count: int, rounds: int
) -> list[Row]:
    layers = range(len(kinds[0][0].shapes))
    runs = [
        _timed(products(packing, layers, count, behind))
        for packing, (_, behind) in zip(placed, kinds, strict=True)
    ]
    times = in_turn(rounds, *runs)
    rows: list[Row] = []
    for (packing, behind), values in zip(kinds, times, strict=True):
        row = {
            "precision": packing.precision,
            "rows": count,
            "ms": 1e3 * statistics.median(values),
            "best_ms": 1e3 * min(values),
            "aligned": not behind,
        }
        rows.append(row)
    for (row, values), (later, other) in itertools.pairwise(zip(rows, times, strict=True)):
        if row["aligned"] and not later["aligned"]:
            later["over_aligned"] = median_ratio(other, values)
    return rows


def _timed(run: Callable[[], None]) -> Callable[[], float]:
    def seconds() -> float:
        started_s = time.perf_counter()
        run()
        return time.perf_counter() - started_s

    return seconds
