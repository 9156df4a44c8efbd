"""Choose how the decode steps of one batch size are computed: what is fastest on this device."""

import logging
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from redmux_server.models.causal.selfcheck import TOLERANCE
from redmux_server.models.cuda.decoder import DecodeWay
from redmux_server.models.proving import relative_error

logger = logging.getLogger(__name__)
Replay = Callable[[], None]
# Takes what launches work again and returns how long that takes on the device.
Seconds = Callable[[Replay], float]


@dataclass(frozen=True, slots=True)
class Chosen:
    """The way of one batch size, and its time as a share of the first way's."""

    name: str
    share: float


def cuda_seconds(replay: Replay) -> float:
    """Returns the median time of a replay on the current CUDA stream."""
    times: list[float] = []
    for _ in range(7):
        start, end = (
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(2)
        )
        start.record()
        replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[2:])


def choose_way(
    ways: Sequence[DecodeWay],
    num_rows: int,
    capture: Callable[[DecodeWay], Replay],
    logits: Tensor,
    seconds: Seconds,
) -> tuple[Replay, Chosen]:
    """Returns the fastest way for this many rows, captured, of those that compute the same.

    `capture` captures a way, whose replays fill `logits`. What the first way raises is raised; any
    other that fails or differs from it is left out with a line in the log.
    """
    first, *others = ways
    replay = capture(first)
    others = [way for way in others if num_rows <= way.most_rows]
    if not others:
        return replay, Chosen(first.name, 1.0)
    replay()
    want = logits.clone()
    first_s = best_s = seconds(replay)
    name = first.name
    for way in others:
        try:
            other = capture(way)
            other()
            _compare(logits, want)
        except Exception as err:  # a kernel that does not compile or compute must not stop a server
            logger.warning("not used for %d rows: %s: %s", num_rows, way.name, err)
            continue
        other_s = seconds(other)
        if other_s < best_s:
            replay, name, best_s = other, way.name, other_s
    return replay, Chosen(name, best_s / first_s)


def summary(chosen: dict[int, Chosen]) -> str:
    """Returns which way serves which batch sizes, for a reason that is shown."""
    sizes: dict[str, list[int]] = {}
    for size in sorted(chosen):
        sizes.setdefault(chosen[size].name, []).append(size)
    parts = []
    for name, own in sizes.items():
        shares = [chosen[size].share for size in own]
        part = f"{name} for {', '.join(map(str, own))} requests"
        if min(shares) < 1:
            part += f" ({min(shares):.2f} to {max(shares):.2f} of the time of separate kernels)"
        parts.append(part)
    return "; ".join(parts)


def _compare(got: Tensor, want: Tensor) -> None:
    error = relative_error(got, want)
    if not error < TOLERANCE[want.dtype]:  # as the start-up check, which has the plain model
        raise RuntimeError(f"its logits differ by {error:.1e} relative to the largest")
