"""What a server tells of itself, without any protobuf in it."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeAlias

Health: TypeAlias = Literal["serving", "not_serving", "unknown"]
ModelKind: TypeAlias = Literal["decoder", "encoder", "encoder_decoder"]


@dataclass(frozen=True, slots=True)
class Latencies:
    """A histogram of seconds: `counts` has one for each of `limits_s`, and one for what is above.

    Each limit takes what the one before does not.
    """

    limits_s: tuple[float, ...]
    counts: tuple[int, ...]
    sum_s: float

    @property
    def num(self) -> int:
        """How many there were."""
        return sum(self.counts)

    @property
    def mean_s(self) -> float | None:
        """Their mean, None for none."""
        return self.sum_s / self.num if self.num else None

    def quantile_s(self, share: float) -> float | None:
        """Returns what `share` of them, 0 to 1, did not exceed, None for none.

        Between two limits they count as spread evenly; above the last one it is the last one.
        """
        wanted = share * self.num
        before = 0
        for (low_s, high_s), count in zip(
            pairwise((0.0, *self.limits_s)), self.counts, strict=False
        ):
            if count and before + count >= wanted:
                return low_s + (high_s - low_s) * (wanted - before) / count
            before += count
        return self.limits_s[-1] if self.num else None

    def since(self, earlier: "Latencies") -> "Latencies":
        """Returns those that came after an earlier state of the same histogram."""
        counts = zip(self.counts, earlier.counts, strict=True)
        return Latencies(
            self.limits_s, tuple(now - then for now, then in counts), self.sum_s - earlier.sum_s
        )


@dataclass(frozen=True, slots=True)
class Load:
    """What a server does now, and what it has done since its start over all callers.

    The tokens are those that were computed, but for `num_cached_tokens`, which were found in the
    cache instead. `num_refused` requests never came to the queue. `num_running_adapters` distinct
    adapters are in the batch, the base model not counted; `kv_cache_used` is a share, 0 to 1.
    """

    num_prompt_tokens: int
    num_completion_tokens: int
    num_cached_tokens: int
    num_ended: int
    num_refused: int
    num_running_adapters: int
    kv_cache_used: float
    first_token: Latencies
    between_tokens: Latencies
    whole_request: Latencies


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What a server is, how it was set up and how busy it is.

    `choices` says why device, dtype, threads and kernels are what they are. `bit_identical` tells
    whether the start-up check found logits bit-identical alone and in mixed batches. `max_context`
    counts prompt and completion together; `max_running` and `max_batch_tokens` bound one forward
    pass. A decoder generates, scores and embeds, an encoder classifies and embeds, an
    encoder-decoder generates. `trains` tells whether training jobs are taken. `load` is None for a
    server that does not tell it.
    """

    version: str
    model: str
    base_fingerprint: str
    architecture: str
    device: str
    dtype: str
    choices: tuple[str, ...]
    bit_identical: bool
    vocab_size: int
    max_context: int
    max_running: int
    max_batch_tokens: int
    max_queue: int
    kv_cache_tokens: int
    num_adapters: int
    num_running: int
    num_waiting: int
    uptime_s: float
    kind: ModelKind
    trains: bool
    load: Load | None
