"""What a server tells of itself: frozen values without any protobuf in them."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

Health: TypeAlias = Literal["serving", "not_serving", "unknown"]
ModelKind: TypeAlias = Literal["decoder", "encoder", "encoder_decoder"]


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What a server is, how it was set up and how busy it is.

    `choices` says why device, dtype, threads and kernels are what they are. `bit_identical` tells
    whether the start-up check found logits bit-identical alone and in mixed batches. `max_context`
    counts prompt and completion together; `max_running` and `max_batch_tokens` bound one forward
    pass. A decoder generates, scores and embeds, an encoder classifies and embeds, an
    encoder-decoder generates. `trains` tells whether training jobs are taken.
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
