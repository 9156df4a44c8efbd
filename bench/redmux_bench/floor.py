"""`redmux bench floor`: the engine's steps against what this machine allows."""

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from redmux import InvalidArgumentError
from redmux_adapters import Adapter
from redmux_adapters.bases.load import DEFAULT_MODEL
from redmux_bench import report
from redmux_bench.adapters import model_sites, random_adapter
from redmux_bench.limits import LinearFloor, read_bandwidth
from redmux_bench.server_process import serve_flags
from redmux_bench.steps import Steps
from redmux_bench.summary import median_ratio
from redmux_server.config import load_config
from redmux_server.device import choose
from redmux_server.models.base_model import BaseModel
from redmux_server.models.kvcache import BLOCK
from redmux_server.models.load_causal import load_causal

_SPARE_CACHE_TOKENS = 1024  # for the check that the engine makes of itself when it loads


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """A decode step of `batch` requests at `context` tokens; medians over the rounds.

    The floor is the model's matrix products alone and one reading of the keys and values. Ratios
    are medians of the rounds' ratios.
    """

    batch: int
    context: int
    step_ms: float
    adapters_step_ms: float  # a different adapter in every row
    floor_ms: float
    linears_ms: float
    kv_ms: float
    step_over_floor: float
    adapters_over_floor: float
    adapters_over_step: float


@dataclass(frozen=True, slots=True)
class PrefillRow:
    """A prompt from nothing to its first token; the floor is its matrix products alone."""

    tokens: int
    chunk: int
    prefill_ms: float
    adapter_prefill_ms: float
    floor_ms: float
    tokens_per_s: float
    prefill_over_floor: float
    adapter_over_prefill: float


def run(options: argparse.Namespace) -> int:
    """Measures the points and the prefill in this process, without a server."""
    model = _load(options)
    steps = Steps(model, options.chunk, options.seed)
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
    _print(rows, prefills, bandwidth)
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
    steps: Steps,
    linears: LinearFloor,
    adapters: Sequence[Adapter],
    context: int,
    kv_s_per_token: float,
    rounds: int,
) -> DecodeRow:
    batch = len(adapters)
    kv_s = batch * context * kv_s_per_token
    products, plain, edited = _in_turn(
        rounds,
        lambda: linears.seconds(batch, batch),
        lambda: steps.decode_s(batch, context, []),
        lambda: steps.decode_s(batch, context, adapters),
    )
    floors = [product + kv_s for product in products]
    return DecodeRow(
        batch=batch,
        context=context,
        step_ms=1e3 * statistics.median(plain),
        adapters_step_ms=1e3 * statistics.median(edited),
        floor_ms=1e3 * statistics.median(floors),
        linears_ms=1e3 * statistics.median(products),
        kv_ms=1e3 * kv_s,
        step_over_floor=median_ratio(plain, floors),
        adapters_over_floor=median_ratio(edited, floors),
        adapters_over_step=median_ratio(edited, plain),
    )


def _prefill(
    steps: Steps, linears: LinearFloor, adapter: Adapter, options: argparse.Namespace
) -> PrefillRow:
    tokens, chunk = options.prefill_tokens, options.chunk
    counts = [min(chunk, tokens - start) for start in range(0, tokens, chunk)]

    def products() -> float:
        last = len(counts) - 1  # the only chunk whose last row needs the head
        return sum(linears.seconds(count, int(i == last)) for i, count in enumerate(counts))

    floors, plain, edited = _in_turn(
        options.rounds,
        products,
        lambda: steps.prefill_s(tokens, None),
        lambda: steps.prefill_s(tokens, adapter),
    )
    return PrefillRow(
        tokens=tokens,
        chunk=chunk,
        prefill_ms=1e3 * statistics.median(plain),
        adapter_prefill_ms=1e3 * statistics.median(edited),
        floor_ms=1e3 * statistics.median(floors),
        tokens_per_s=tokens / statistics.median(plain),
        prefill_over_floor=median_ratio(plain, floors),
        adapter_over_prefill=median_ratio(edited, plain),
    )


def _in_turn(rounds: int, *measurements: Callable[[], float]) -> list[list[float]]:
    """Returns the results of each measurement, after one round that does not count."""
    results: list[list[float]] = [[] for _ in measurements]
    for index in range(1 + rounds):
        for measure, values in zip(measurements, results, strict=True):
            value = measure()
            if index:
                values.append(value)
    return results


def _print(rows: Sequence[DecodeRow], prefills: Sequence[PrefillRow], bandwidth: float) -> None:
    print(f"memory: {bandwidth / 1e9:.1f} GB/s read")
    report.print_table(
        ("decode step", "ms", "with adapters", "floor", "of it linears", "step/floor",
         "adapters/floor", "adapters/step"),
        [
            (f"{r.batch} at {r.context}", r.step_ms, r.adapters_step_ms, r.floor_ms, r.linears_ms,
             r.step_over_floor, r.adapters_over_floor, r.adapters_over_step)
            for r in rows
        ],
    )  # fmt: skip
    if prefills:
        print()
        report.print_table(
            ("prefill", "ms", "with an adapter", "floor", "tokens/s", "prefill/floor",
             "adapter/none"),
            [
                (f"{r.tokens} by {r.chunk}", r.prefill_ms, r.adapter_prefill_ms, r.floor_ms,
                 r.tokens_per_s, r.prefill_over_floor, r.adapter_over_prefill)
                for r in prefills
            ],
        )  # fmt: skip
