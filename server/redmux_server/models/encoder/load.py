"""Load an encoder and make it ready to serve: attention, products, heads, self-check."""

import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from redmux.errors import InvalidArgumentError
from redmux_adapters import editable_sites, fingerprint, with_layer_norms
from redmux_adapters.bases.load import load_encoder as load_plain
from redmux_server.config import ServerConfig
from redmux_server.device import Choices
from redmux_server.engine.bank import AdapterBank
from redmux_server.models.cpu.accelerate import computes_in_torch, pack_linears, unmap
from redmux_server.models.cpu.precision import check_not_rounded
from redmux_server.models.encoder.check import EncoderCheck, reference
from redmux_server.models.encoder.heads import Heads
from redmux_server.models.encoder.packed_sequences import attach_packed
from redmux_server.models.encoder.runner import EncoderRunner
from redmux_server.models.text import TextCodec

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EncoderModel:
    """An encoder that is ready to serve, and what the rest of the server must know of it."""

    runner: EncoderRunner
    bank: AdapterBank
    heads: Heads
    codec: TextCodec
    fingerprint: str
    architecture: str
    sites: Mapping[str, int]  # editable module path -> output size
    hidden_size: int
    vocab_size: int
    max_context: int
    max_batch_tokens: int  # of one step, and at least max_context: no prompt is cut
    device: torch.device
    dtype: torch.dtype
    bit_identical: bool
    reasons: Sequence[str]


def load_encoder(config: ServerConfig, choices: Choices) -> EncoderModel:
    """Returns the configured encoder, loaded, accelerated and checked against its plain self.

    Raises InvalidArgumentError if it cannot be found and FailedPreconditionError if its
    architecture cannot be served rightly.
    """
    check_not_rounded(config, "an encoder")
    model, tokenizer = load_plain(config.model, choices.dtype, config.tokenizer)
    identity = fingerprint(model)
    sites = with_layer_norms(editable_sites(model))
    model = model.to(choices.device)
    max_context = _max_context(config, model)
    expected = reference(model, max_context)
    attention = attach_packed(model, max_context)
    if choices.device.type == "cpu" and choices.dtype == torch.float32:
        parts = [
            "attention: exact-length kernel over each sequence",
            f"linears: {pack_linears(model)} packed",
        ]
    else:
        unmap(model)
        parts = [
            "attention: torch over each sequence at its exact length",
            "linears: torch's own (not fp32 on a CPU)",
        ]
    pooler = getattr(model, "pooler", None)
    model.pooler = None  # it would read the first sequence of a step only
    hidden_size = int(model.config.hidden_size)
    heads = Heads(pooler)

    def make_runner(bank: AdapterBank) -> EncoderRunner:
        return EncoderRunner(model, attention, bank, choices.num_threads)

    with contextlib.closing(EncoderCheck(make_runner, heads, sites, choices)) as check:
        error = check.compare(expected)
        # No product of torch's promises that, whatever a few steps show.
        bit_identical = not computes_in_torch(model) and check.is_bit_identical(
            expected, hidden_size
        )
    reasons = [
        *choices.reasons,
        *parts,
        f"hidden states within {error:.1e} of the plain model's largest",
        "bit-identical in any batch: yes, checked at start"
        if bit_identical
        else "bit-identical in any batch: no, results may differ in their last bits",
    ]
    for reason in reasons:
        logger.info("%s", reason)
    bank = AdapterBank(
        sites, device=choices.device, dtype=choices.dtype, max_bytes=config.bank_bytes,
        min_slots=config.max_running + 1,
    )  # fmt: skip
    return EncoderModel(
        runner=make_runner(bank), bank=bank, heads=heads, codec=TextCodec(tokenizer, None),
        fingerprint=identity, architecture=type(model).__name__, sites=sites,
        hidden_size=hidden_size, vocab_size=model.get_input_embeddings().num_embeddings,
        max_context=max_context, max_batch_tokens=max(config.max_batch_tokens, max_context),
        device=choices.device, dtype=choices.dtype, bit_identical=bit_identical, reasons=reasons,
    )  # fmt: skip


def _max_context(config: ServerConfig, model: Any) -> int:
    """Returns the most tokens of an input: what the table of positions has behind its offset."""
    padding_id = getattr(getattr(model, "embeddings", None), "padding_idx", None)
    offset = 0 if padding_id is None else padding_id + 1
    limit = int(model.config.max_position_embeddings) - offset
    if config.max_context > limit:
        raise InvalidArgumentError(
            f"max_context is {config.max_context}, but the model's positions end at {limit}"
        )
    return config.max_context or limit
