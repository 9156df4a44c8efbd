"""What a server did between two moments: rates and latencies for people and programs."""

from dataclasses import dataclass
from itertools import starmap

from redmux.errors import UnimplementedError
from redmux.server_types import Latencies, Load, ServerInfo


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Seconds that half of them, and 95 of 100, did not exceed; None where there were none."""

    num: int
    p50_s: float | None
    p95_s: float | None


@dataclass(frozen=True, slots=True)
class Figures:
    """What `redmux top` tells: the state at the end of an interval, and what was done in it.

    `kv_cache_used` is a share, 0 to 1. The tokens per second are those computed, but for
    `cached_tokens_per_s`, which were found in the cache.
    """

    version: str
    model: str
    device: str
    dtype: str
    uptime_s: float
    interval_s: float
    num_running: int
    max_running: int
    num_waiting: int
    max_queue: int
    num_running_adapters: int
    num_adapters: int
    kv_cache_used: float
    kv_cache_tokens: int
    prompt_tokens_per_s: float
    completion_tokens_per_s: float
    cached_tokens_per_s: float
    requests_per_s: float
    refused_per_s: float
    first_token: Quantiles
    between_tokens: Quantiles
    whole_request: Quantiles


def figures(earlier: ServerInfo, now: ServerInfo) -> Figures:
    """Returns the figures between two states of one server, by the server's own clock.

    Where it was restarted meanwhile they are those since its start. Raises UnimplementedError for a
    server that does not tell its load.
    """
    load, before = now.load, earlier.load
    if load is None:
        raise UnimplementedError("the server is an older one, which does not tell its load")
    interval_s = now.uptime_s - earlier.uptime_s
    if before is None or interval_s <= 0:  # another process
        before, interval_s = _nothing(load), now.uptime_s
    interval_s = max(interval_s, 1e-9)

    def rate(name: str) -> float:
        done: float = getattr(load, name) - getattr(before, name)
        return done / interval_s

    pairs = (
        (load.first_token, before.first_token),
        (load.between_tokens, before.between_tokens),
        (load.whole_request, before.whole_request),
    )
    first_token, between_tokens, whole_request = starmap(_quantiles, pairs)
    return Figures(
        version=now.version,
        model=now.model,
        device=now.device,
        dtype=now.dtype,
        uptime_s=now.uptime_s,
        interval_s=interval_s,
        num_running=now.num_running,
        max_running=now.max_running,
        num_waiting=now.num_waiting,
        max_queue=now.max_queue,
        num_running_adapters=load.num_running_adapters,
        num_adapters=now.num_adapters,
        kv_cache_used=load.kv_cache_used,
        kv_cache_tokens=now.kv_cache_tokens,
        prompt_tokens_per_s=rate("num_prompt_tokens"),
        completion_tokens_per_s=rate("num_completion_tokens"),
        cached_tokens_per_s=rate("num_cached_tokens"),
        requests_per_s=rate("num_ended"),
        refused_per_s=rate("num_refused"),
        first_token=first_token,
        between_tokens=between_tokens,
        whole_request=whole_request,
    )


def _quantiles(now: Latencies, before: Latencies) -> Quantiles:
    found = now.since(before)
    return Quantiles(found.num, found.quantile_s(0.5), found.quantile_s(0.95))


def _nothing(load: Load) -> Load:
    """Returns what a server tells that has done nothing yet."""

    def empty(histogram: Latencies) -> Latencies:
        return Latencies(histogram.limits_s, (0,) * len(histogram.counts), 0.0)

    return Load(
        0, 0, 0, 0, 0, 0, 0.0,
        empty(load.first_token), empty(load.between_tokens), empty(load.whole_request),
    )  # fmt: skip
