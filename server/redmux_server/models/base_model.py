"""BaseModel: a model that is ready to serve."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from redmux_server.engine.bank import AdapterBank
from redmux_server.engine.grammar import Bar
from redmux_server.engine.stepper import Runner
from redmux_server.models.text import TextCodec


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A model that is ready to serve, and what the rest of the server must know of it."""

    runner: Runner
    bank: AdapterBank
    codec: TextCodec
    fingerprint: str
    architecture: str
    sites: Mapping[str, int]  # editable module path -> output size
    hidden_size: int
    vocab_size: int
    max_context: int
    max_batch_tokens: int  # of one step
    num_blocks: int
    block_size: int  # tokens
    kv_bytes_per_token: int
    device: torch.device
    dtype: torch.dtype
    bar: Bar  # takes out of its logits what grammars bar
    linears: Sequence[nn.Module]  # the matrix products of a step, in the order of running
    bit_identical: bool
    reasons: Sequence[str]
    max_idle_blocks: int | None = None  # kept for later prompts; None bounds nothing
    decoder_start: int | None = None  # of an encoder-decoder: what its decoder starts with
