"""`redmux bench floor`: the engine's steps against what this machine allows."""

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

from redmux import InvalidArgumentError
from redmux_adapters import Adapter
from redmux_adapters.bases.load import DEFAULT_MODEL
from redmux_bench import report
from redmux_bench.adapters import model_sites, random_adapter
from redmux_bench.limits import LinearFloor, read_bandwidth
from redmux_bench.rounds import in_turn, median_ratio
from redmux_bench.server_process import serve_flags
from redmux_bench.steps import TimedSteps
from redmux_bench.tables import print_table
from redmux_server.config import load_config
from redmux_server.device import choose
from redmux_server.models.base_model import BaseModel
from redmux_server.models.kvcache import BLOCK
from redmux_server.models.load_causal import load_causal

Row = dict[str, Any]
_SPARE_CACHE_TOKENS = 1024  # for the check that the engine makes of itself when it loads


def run(options: argparse.Namespace) -> int:
    """Measures the points and the prefill in this process, without a server."""
    model = _load(options)
    steps = TimedSteps(model, options.chunk, options.seed)
    bandwidth = read_bandwidth()
    linears = LinearFloor(model)
    sites = model_sites(options.model or DEFAULT_MODEL)
    most = max(batch for batch, _ in options.points)
    adapters = [random_adapter(model.fingerprint, sites, options.seed + i) for i in range(most)]
    contexts = _contexts(options.points)
    with report.progress(sum(contexts), "token") as bar:
        for context in contexts:
            steps.fill(context)
            bar.update(context)
    kv_s_per_token = model.kv_bytes_per_token / bandwidth
    rows = [
        _decode(steps, linears, adapters[:batch], context, kv_s_per_token, options.rounds)
        for batch, context in options.points
    ]
    prefills = []
    if options.prefill_tokens:
        prefills.append(_prefill(steps, linears, adapters[0], options))
    print(f"memory: {bandwidth / 1e9:.1f} GB/s read")
    print_table(
        ("decode step", "ms", "with adapters", "floor", "of it linears", "of it keys", "step/floor",
         "adapters/floor", "adapters/step"),
        [(f"{batch} at {context}", *rest) for batch, context, *rest in map(dict.values, rows)],
    )  # fmt: skip
    if prefills:
        print()
        print_table(
            ("prefill", "ms", "with an adapter", "floor", "tokens/s", "prefill/floor",
             "adapter/none"),
            [(f"{size} by {chunk}", *rest) for size, chunk, *rest in map(dict.values, prefills)],
        )  # fmt: skip
    results = {"rows": rows, "prefill": prefills, "read_bandwidth_bytes_per_s": bandwidth}
    report.write_json(options, options.model or DEFAULT_MODEL, results)
    return 0


def _load(options: argparse.Namespace) -> BaseModel:
    """Returns the model as `redmux serve` loads it, with a cache for all that is measured."""
    lengths = [*_contexts(options.points), options.prefill_tokens]
    tokens = sum(-(-(length + 1) // BLOCK) * BLOCK for length in lengths) + _SPARE_CACHE_TOKENS
    most = max(batch for batch, _ in options.points)
    flags = serve_flags(options, most)
    config = load_config(["--device", "cpu", "--kv-cache-tokens", str(tokens), *flags])
    model = load_causal(config, choose(config))
    if max(lengths) >= model.max_context:
        raise InvalidArgumentError(
            f"{max(lengths)} tokens and one more exceed the model's context, {model.max_context}"
        )
    return model


def _contexts(points: Sequence[tuple[int, int]]) -> list[int]:
    """Returns the longest context in which each row of a batch is used."""
    most = max(batch for batch, _ in points)
    return [max(context for batch, context in points if batch > row) for row in range(most)]


def _decode(
    steps: TimedSteps,
    linears: LinearFloor,
    adapters: Sequence[Adapter],
    context: int,
    kv_s_per_token: float,
    rounds: int,
) -> Row:
    """Times a decode step of as many requests as adapters, without and with one in every row.

    The floor is the model's matrix products alone and one reading of the keys and values. Medians
    over the rounds; ratios are medians of the rounds' ratios.
    """
    batch = len(adapters)
    kv_s = batch * context * kv_s_per_token
    products, plain, edited = in_turn(
        rounds,
        lambda: linears.seconds(batch, batch),
        lambda: steps.decode_s(batch, context, []),
        lambda: steps.decode_s(batch, context, adapters),
    )
    floors = [product + kv_s for product in products]
    return {
        "batch": batch,
        "context": context,
        "step_ms": 1e3 * statistics.median(plain),
        "adapters_step_ms": 1e3 * statistics.median(edited),
        "floor_ms": 1e3 * statistics.median(floors),
        "linears_ms": 1e3 * statistics.median(products),
        "kv_ms": 1e3 * kv_s,
        "step_over_floor": median_ratio(plain, floors),
        "adapters_over_floor": median_ratio(edited, floors),
        "adapters_over_step": median_ratio(edited, plain),
    }


def _prefill(
    steps: TimedSteps, linears: LinearFloor, adapter: Adapter, options: argparse.Namespace
) -> Row:
    """Times a prompt from nothing to its first token; the floor is its matrix products alone."""
    tokens, chunk = options.prefill_tokens, options.chunk
    counts = [min(chunk, tokens - start) for start in range(0, tokens, chunk)]

    def products() -> float:
        last = len(counts) - 1  # the only chunk whose last row needs the head
        return sum(linears.seconds(count, int(i == last)) for i, count in enumerate(counts))

    floors, plain, edited = in_turn(
        options.rounds,
        products,
        lambda: steps.prefill_s(tokens, None),
        lambda: steps.prefill_s(tokens, adapter),
    )
    return {
        "tokens": tokens,
        "chunk": chunk,
        "prefill_ms": 1e3 * statistics.median(plain),
        "adapter_prefill_ms": 1e3 * statistics.median(edited),
        "floor_ms": 1e3 * statistics.median(floors),
        "tokens_per_s": tokens / statistics.median(plain),
        "prefill_over_floor": median_ratio(plain, floors),
        "adapter_over_prefill": median_ratio(edited, plain),
    }
