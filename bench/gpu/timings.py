"""Times of decode steps: over the number of adapters, and against the bytes that must move."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rig import Engine, random_model

from redmux_server.engine.request import Request

Row = dict[str, Any]


def bandwidth(device: torch.device, num_bytes: int) -> float:
    """Returns bytes per second of a large copy on the device, reads and writes counted."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = [_timed(lambda: target.copy_(source), device) for _ in range(8)]
    return 2 * num_bytes / statistics.median(times[2:])


def decode_steps(
    shape: str, device: torch.device, dtype: torch.dtype, *, smoke: bool, bytes_per_s: float
) -> tuple[list[Row], list[Row], Sequence[str]]:
    """Returns (adapters sweep, batch sweep, what ran) of one model shape.

    Every step decodes one token per request at a fixed context and picks the largest logit on the
    host, as the engine does; packing and launching are part of the time.
    """
    largest, context = (4, 24) if smoke else (64, 256)
    engine = Engine(
        random_model(shape, device, dtype), max_running=largest, max_context=context + 8
    )
    requests = _prefilled(engine, largest, context)
    repeats, rounds = (1, 2) if smoke else (20, 7)
    sweep = _adapter_sweep(engine, requests, (0, 1, 4, 8) if smoke else (0, 1, 16, 64, 128, 256),
                           repeats, rounds)  # fmt: skip
    sizes = [1 << i for i in range(largest.bit_length())]
    floors = [_batch_row(engine, requests[:n], context, bytes_per_s, repeats, rounds)
              for n in sizes]  # fmt: skip
    return sweep, floors, engine.reasons


def _prefilled(engine: Engine, count: int, context: int) -> list[Request]:
    vocab = engine.model.config.vocab_size
    requests = [
        engine.request([(7 * i + 13 * j) % vocab for j in range(context)], 2) for i in range(count)
    ]
    for i in range(0, count, 8):
        engine.step([(r, context) for r in requests[i : i + 8]])
    for request in requests:
        request.token_ids.append(1)
    return requests


def _decode(engine: Engine, requests: Sequence[Request]) -> None:
    logits = engine.step([(r, 1) for r in requests])
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

    def steps(num_adapters: int) -> None:
        nonlocal offset
        for _ in range(repeats):
            for i, request in enumerate(requests):
                request.slot = slots[(offset + i) % num_adapters] if num_adapters else None
            offset += len(requests)
            _decode(engine, requests)

    times: dict[int, list[float]] = {n: [] for n in counts}
    for n in counts:
        steps(n)
    for _ in range(rounds):
        for n in counts:
            times[n].append(_timed(lambda n=n: steps(n), engine.model.device) / repeats)
    for request in requests:
        request.slot = None
    rows = []
    for n in counts:
        ratios = [base / own for base, own in zip(times[counts[0]], times[n], strict=True)]
        step_s = statistics.median(times[n])
        rows.append({
            "adapters": n, "step ms": round(1e3 * step_s, 3),
            "tokens/s": round(len(requests) / step_s),
            "speed of no adapter": round(statistics.median(ratios), 4),
        })  # fmt: skip
    return rows


def _batch_row(
    engine: Engine, requests: Sequence[Request], context: int, bytes_per_s: float, repeats: int,
    rounds: int,
) -> Row:  # fmt: skip
    def steps() -> None:
        for _ in range(repeats):
            _decode(engine, requests)

    steps()
    times = [_timed(steps, engine.model.device) / repeats for _ in range(rounds)]
    step_s = statistics.median(times)
    floor_s = step_bytes(engine.model, len(requests), context) / bytes_per_s
    return {
        "batch": len(requests), "step ms": round(1e3 * step_s, 3),
        "floor ms": round(1e3 * floor_s, 3), "step / floor": round(step_s / floor_s, 3),
        "tokens/s": round(len(requests) / step_s),
    }  # fmt: skip


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


def _timed(call: Callable[[], object], device: torch.device) -> float:
    _finish(device)
    started_s = time.perf_counter()
    call()
    _finish(device)
    return time.perf_counter() - started_s


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
