"""Times of decode steps: over the number of adapters, and against the bytes that must move."""

import functools
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from rig import Engine, random_model

from redmux_adapters import Adapter
from redmux_bench.rounds import in_turn, median_ratio
from redmux_server.engine.request import Request
from redmux_server.models.cuda.graphed_decode import CudaCapture
from redmux_server.models.cuda.paged_cache import AttentionRule, PagedAttention, PagedKVCache
from redmux_server.models.cuda.paged_step import HostIndex, PagedStep, to_device
from redmux_server.models.cuda.runner import DeviceRunner
from redmux_server.models.kvcache import LayerShape, Segment

Row = dict[str, Any]
COPIED = "copy GB/s, read + write"


def bandwidth(device: torch.device, num_bytes: int) -> list[Row]:
    """Times a large copy on the device, reads and writes counted."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    (times,) = in_turn(6, lambda: _timed(lambda: target.copy_(source), device), warm_ups=2)
    return [{COPIED: round(2 * num_bytes / statistics.median(times) / 1e9, 1)}]


@torch.inference_mode()
def attention(
    make: Callable[[], PagedAttention], shape: LayerShape, device: torch.device, dtype: torch.dtype
) -> list[Row]:
    """Times one layer's attention of decodes, alone and launched from a graph where that can be."""
    library = make()
    rows = []
    for batch, context in ((1, 256), (1, 4096), (64, 256), (64, 2048)):
        width = -(-context // library.block_size)
        cache = PagedKVCache([shape], batch * width, library, device, dtype)
        blocks = [list(range(i, batch * width, batch)) for i in range(batch)]
        host = HostIndex.of(
            [Segment(i, 1, context - 1, own) for i, own in enumerate(blocks)], library.block_size
        )
        step = replace(PagedStep.of(host, to_device(host.arrays(), device)), is_static=True)
        query = torch.randn(batch, shape.num_heads, shape.head_dim, device=device).to(dtype)
        (layer,) = cache.layers
        rule = AttentionRule(shape, shape.head_dim**-0.5, 0, 0.0)

        def call() -> None:
            library(step, rule, query, layer.keys, layer.values)  # noqa: B023

        launch = CudaCapture()(call) if library.can_graph else call
        seconds = statistics.median(
            _timed(functools.partial(_repeat, launch, 20), device) for _ in range(7)
        )
        moved = 2 * batch * context * shape.num_kv_heads * shape.head_dim * dtype.itemsize
        rows.append({"batch": batch, "context": context, "us": round(1e6 * seconds / 20, 1),
                     "GB/s of keys and values": round(20 * moved / seconds / 1e9)})  # fmt: skip
    return rows


def _repeat(call: Callable[[], None], count: int) -> None:
    for _ in range(count):
        call()


def decode_steps(
    shape: str, device: torch.device, dtype: torch.dtype, smoke: bool, bytes_per_s: float
) -> tuple[Any, ...]:
    """Returns (adapters sweep, batch sweep, prefills, profiles, what ran) of one model shape.

    Every step decodes one token per request at a fixed context and picks the largest logit on the
    host, as the engine does; packing and launching are part of the time.
    """
    largest, context = (4, 24) if smoke else (64, 256)
    engine = Engine(
        random_model(shape, device, dtype), max_running=largest, max_context=context + 8
    )
    prefills = prefill(engine, context)
    requests = _prefilled(engine, largest, context)
    repeats, rounds = (1, 2) if smoke else (20, 7)
    sweep = _adapter_sweep(engine, requests, (0, 1, 4, 8) if smoke else (0, 1, 16, 64, 128, 256),
                           repeats, rounds)  # fmt: skip
    sizes = [1 << i for i in range(largest.bit_length())]
    runners = {way: engine.runner_by(way) for way in engine.ways}
    floors = [
        row for n in sizes
        for row in _batch_rows(engine, runners, requests[:n], context, bytes_per_s, repeats, rounds)
    ]  # fmt: skip
    profiles = [] if smoke else [_profile(engine, requests[:n]) for n in (1, largest)]
    return sweep, floors, prefills, *profiles, engine.reasons


def _profile(engine: Engine, requests: Sequence[Request], num_kernels: int = 9) -> list[Row]:
    """Returns where a decode step's time on the device goes, largest first."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(4):
            _decode(engine, requests)
    kernels = sorted(profile.key_averages(), key=lambda k: -k.self_device_time_total)
    total = sum(k.self_device_time_total for k in kernels)
    rows = [
        {"batch": len(requests), "us": round(k.self_device_time_total / 4, 1),
         "launches": k.count // 4, "kernel": k.key[:70]}
        for k in kernels[:num_kernels]
    ]  # fmt: skip
    return [{"batch": len(requests), "us": round(total / 4, 1), "launches": "", "kernel": "all"},
            *rows]  # fmt: skip


def prefill(engine: Engine, length: int) -> list[Row]:
    """Times the prefill of prompts together, as a share of the products' own arithmetic."""
    rows = []
    weights = sum(p.numel() for p in engine.model.model.layers.parameters())
    for count in (1, 4) if length < 256 else (1, 8):
        requests = _requests(engine, length, [engine.adapter(i) for i in range(count)])

        def step() -> None:
            engine.step([(r, length) for r in requests]).argmax(-1).tolist()  # noqa: B023
            for request in requests:  # noqa: B023
                request.num_computed = 0

        (times,) = in_turn(7, functools.partial(_timed, step, engine.model.device))
        seconds = statistics.median(times)
        engine.release(requests)
        tokens = count * length
        rate = 2 * weights * tokens / seconds / 1e12
        rows.append({"prompts": count, "tokens": tokens, "ms": round(1e3 * seconds, 2),
                     "TFLOP/s of layers": round(rate, 1)})  # fmt: skip
    return rows


def _requests(engine: Engine, length: int, adapters: Sequence[Adapter | None]) -> list[Request]:
    vocab = engine.model.config.vocab_size
    return [
        engine.request([(7 * i + 13 * j) % vocab for j in range(length)], 2, adapter)
        for i, adapter in enumerate(adapters)
    ]


def _prefilled(engine: Engine, count: int, context: int) -> list[Request]:
    requests = _requests(engine, context, [None] * count)
    for i in range(0, count, 8):
        engine.step([(r, context) for r in requests[i : i + 8]])
    for request in requests:
        request.token_ids.append(1)
    return requests


def _decode(
    engine: Engine, requests: Sequence[Request], runner: DeviceRunner | None = None
) -> None:
    logits = engine.step([(r, 1) for r in requests], runner)
    logits.argmax(-1).tolist()
    for request in requests:
        request.num_computed -= 1  # the same step again


def _adapter_sweep(
    engine: Engine, requests: Sequence[Request], counts: Sequence[int], repeats: int, rounds: int
) -> list[Row]:
    """Interleaves the numbers of distinct adapters, so that all meet the same machine."""
    adapters = [engine.adapter(seed) for seed in range(max(counts))]
    slots = [engine.bank.acquire(a.digest, a.edits) for a in adapters]
    offset = 0

    def step(num_adapters: int) -> None:
        nonlocal offset
        for i, request in enumerate(requests):
            request.slot = slots[(offset + i) % num_adapters] if num_adapters else None
        offset += len(requests)
        _decode(engine, requests)

    steps = (functools.partial(step, n) for n in counts)
    times = _interleaved(steps, repeats, rounds, engine.model.device)
    for request in requests:
        request.slot = None
    return [
        {
            "adapters": n, "step ms": round(1e3 * statistics.median(own), 3),
            "tokens/s": round(len(requests) / statistics.median(own)),
            "speed of no adapter": round(median_ratio(times[0], own), 4),
        }
        for n, own in zip(counts, times, strict=True)
    ]  # fmt: skip


def _batch_rows(
    engine: Engine, runners: Mapping[str, DeviceRunner], requests: Sequence[Request],
    context: int, bytes_per_s: float, repeats: int, rounds: int,
) -> list[Row]:  # fmt: skip
    """Times a step in every way, interleaved."""
    steps = (functools.partial(_decode, engine, requests, runner) for runner in runners.values())
    times = _interleaved(steps, repeats, rounds, engine.model.device)
    floor_s = step_bytes(engine.model, len(requests), context) / bytes_per_s
    rows = []
    for way, own in zip(runners, times, strict=True):
        step_s = statistics.median(own)
        rows.append({
            "batch": len(requests), "step ms": round(1e3 * step_s, 3),
            "floor ms": round(1e3 * floor_s, 3), "step / floor": round(step_s / floor_s, 3),
            "tokens/s": round(len(requests) / step_s), "way": way,
        })  # fmt: skip
    return rows


def step_bytes(model: Any, batch: int, context: int) -> int:
    """Returns what a decode step must at least read: every weight and every key and value once.

    An embedding that is no output head is left out: a step reads single rows of it.
    """
    config = model.config
    weights = sum(p.nbytes for p in model.parameters())  # a tied matrix is listed once
    if not config.tie_word_embeddings:
        weights -= model.get_input_embeddings().weight.nbytes
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return weights + batch * (context + 1) * per_token * model.dtype.itemsize


def _interleaved(
    steps: Iterable[Callable[[], None]], repeats: int, rounds: int, device: torch.device
) -> list[list[float]]:
    """Returns the seconds of each step, in every round over so many of the same."""
    calls = (
        functools.partial(_timed, functools.partial(_repeat, s, repeats), device) for s in steps
    )
    times = in_turn(rounds, *calls)
    return [[seconds / repeats for seconds in own] for own in times]


def _timed(call: Callable[[], object], device: torch.device) -> float:
    _finish(device)
    started_s = time.perf_counter()
    call()
    _finish(device)
    return time.perf_counter() - started_s


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
