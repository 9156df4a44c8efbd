"""What a wave comes to: rates, percentiles of latencies, failures."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from redmux_bench.load import Wave


@dataclass(frozen=True, slots=True)
class Percentiles:
    """The median and the slow end of a set of durations, in milliseconds."""

    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, durations_s: Sequence[float]) -> "Percentiles":
        """Returns the percentiles of durations in seconds, of which there must be one."""
        return cls(*(1e3 * float(x) for x in np.percentile(durations_s, (50, 90, 99))))


@dataclass(frozen=True, slots=True)
class Summary:
    """The result of one wave. Rates and latencies are of the requests that completed."""

    num_requests: int
    num_completed: int
    failures: Mapping[str, int]  # error class -> requests
    duration_s: float
    output_tokens: int
    prompt_tokens: int
    output_tokens_per_s: float
    prompt_tokens_per_s: float
    requests_per_s: float
    time_to_first_token_ms: Percentiles | None
    inter_token_ms: Percentiles | None
    end_to_end_ms: Percentiles | None
    client_cpu_s: float


def summarize(wave: Wave) -> Summary:
    """Returns the summary of a wave."""
    done = [call for call in wave.calls if call.error is None]
    output_tokens = sum(len(call.token_times_s) for call in done)
    prompt_tokens = sum(call.num_prompt_tokens for call in done)
    first_s = [call.token_times_s[0] - call.started_s for call in done if call.token_times_s]
    gaps_s = [b - a for call in done for a, b in pairwise(call.token_times_s)]
    return Summary(
        num_requests=len(wave.calls),
        num_completed=len(done),
        failures=failures([wave]),
        duration_s=wave.duration_s,
        output_tokens=output_tokens,
        prompt_tokens=prompt_tokens,
        output_tokens_per_s=output_tokens / wave.duration_s,
        prompt_tokens_per_s=prompt_tokens / wave.duration_s,
        requests_per_s=len(done) / wave.duration_s,
        time_to_first_token_ms=_percentiles(first_s),
        inter_token_ms=_percentiles(gaps_s),
        end_to_end_ms=_percentiles([call.ended_s - call.started_s for call in done]),
        client_cpu_s=wave.client_cpu_s,
    )


def _percentiles(durations_s: Sequence[float]) -> Percentiles | None:
    return Percentiles.of(durations_s) if durations_s else None


def failures(waves: Sequence[Wave]) -> dict[str, int]:
    """Returns how many requests failed with each class of error."""
    errors = (type(call.error) for wave in waves for call in wave.calls if call.error is not None)
    return dict(Counter(kind.__name__ for kind in errors).most_common())
