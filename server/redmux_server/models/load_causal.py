"""Load a decoder and make it ready to serve: attention, cache, kernels, self-check."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from redmux.errors import FailedPreconditionError
from redmux_adapters import editable_sites, fingerprint, load_base, read_config, with_layer_norms
from redmux_server.config import ServerConfig
from redmux_server.device import Choices, name_of
from redmux_server.engine.bank import AdapterBank
from redmux_server.models.base_model import BaseModel
from redmux_server.models.causal.attention import attach, discover
from redmux_server.models.causal.context_limit import context_limit
from redmux_server.models.causal.on_cpu import fuse, keep, linears_of, make_cache, pack_and_run
from redmux_server.models.causal.room import (
    context_and_cache,
    context_reason,
    kv_bytes_per_token,
    max_idle,
    prefix_reason,
)
from redmux_server.models.causal.runner import CachedRunner, CausalRunner
from redmux_server.models.causal.selfcheck import reference
from redmux_server.models.cpu.block_weights import is_on_grids
from redmux_server.models.cpu.precision import choose_kv_dtype, choose_precision
from redmux_server.models.cpu.reservation import Reservation
from redmux_server.models.cpu.token_masks import choose_bar
from redmux_server.models.cuda.runtime import DeviceRuntime
from redmux_server.models.kvcache import BLOCK
from redmux_server.models.text import TextCodec

logger = logging.getLogger(__name__)


def load_causal(
    config: ServerConfig, choices: Choices, reservation: Reservation | None = None
) -> BaseModel:
    """Returns the configured model, loaded, accelerated and checked against its plain self.

    `reservation` is of memory for this model's weights.

    Raises InvalidArgumentError if it cannot be found and FailedPreconditionError if its
    architecture cannot be served rightly.
    """
    _check_causal(read_config(config.model))
    model, tokenizer = load_base(config.model, choices.dtype, config.tokenizer)
    model = model.to(choices.device)
    identity = fingerprint(model)
    sites = with_layer_norms(editable_sites(model))
    vocab_size = model.get_input_embeddings().weight.shape[0]
    if choices.device.type == "cpu":
        parts = _on_cpu(config, choices, model, sites, reservation)
    else:
        parts = _on_device(config, choices, model, sites)
    block_bytes = parts.runner.cache.block_size * parts.kv_bytes_per_token
    idle_blocks = max_idle(config, choices.device, block_bytes)
    reasons = [
        *choices.reasons,
        *parts.reasons,
        "bit-identical in any batch: yes, checked at start"
        if parts.bit_identical
        else "bit-identical in any batch: no, logits may differ in their last bits",
        prefix_reason(config, parts.runner.cache, idle_blocks),
    ]
    for reason in reasons:
        logger.info("%s", reason)
    return BaseModel(
        runner=parts.runner,
        bank=parts.bank,
        codec=TextCodec(tokenizer, model.generation_config),
        fingerprint=identity,
        architecture=model.config.architectures[0],
        sites=sites,
        hidden_size=model.config.get_text_config().hidden_size,
        vocab_size=vocab_size,
        max_context=parts.max_context,
        max_batch_tokens=config.max_batch_tokens,
        num_blocks=parts.runner.cache.num_blocks,
        block_size=parts.runner.cache.block_size,
        kv_bytes_per_token=parts.kv_bytes_per_token,
        device=choices.device,
        dtype=choices.dtype,
        bar=choose_bar(choices.device, choices.dtype),
        linears=parts.linears,
        bit_identical=parts.bit_identical,
        reasons=reasons,
        max_idle_blocks=idle_blocks,
    )


def _check_causal(config: Any) -> None:
    """Raises FailedPreconditionError for a model of a decoder's class that sees what follows."""
    for part in (config, config.get_text_config()):
        for name, seeing in (("use_bidirectional_attention", True), ("is_causal", False)):
            if getattr(part, name, None) is seeing:
                raise FailedPreconditionError(
                    f"{part.model_type!r} with {name}: {str(seeing).lower()} in config.json cannot "
                    f"be served: its tokens attend to those that follow, so it generates nothing"
                )


@dataclass(frozen=True, slots=True)
class _Parts:
    runner: CachedRunner
    bank: AdapterBank
    linears: Sequence[nn.Module]
    kv_bytes_per_token: int
    max_context: int
    bit_identical: bool
    reasons: Sequence[str]


def _on_cpu(
    config: ServerConfig, choices: Choices, model: Any, sites: Mapping[str, int],
    reservation: Reservation | None,
) -> _Parts:  # fmt: skip
    packing, expected = pack_and_run(model, choices, reservation)
    shapes, rules = discover(model)
    limit = context_limit(model.config, rules)
    is_fp32 = choices.dtype == torch.float32
    quantization, why = choose_precision(config.quantization, is_fp32, lambda: is_on_grids(model))
    dtype = name_of(choices.dtype)
    kv_dtype_name, kv_reason = choose_kv_dtype(config.kv_dtype, quantization, dtype)
    kv_dtype = getattr(torch, kv_dtype_name)
    per_token = kv_bytes_per_token(shapes, kv_dtype)
    max_context, num_tokens = context_and_cache(config, choices.device, per_token, limit)
    cache, attention_reason = make_cache(shapes, num_tokens // BLOCK, choices, kv_dtype)
    checked = fuse(model, packing, rules, cache, sites, expected, choices, quantization) or keep(
        model, cache, sites, expected, choices, quantization
    )
    bank = AdapterBank(
        sites,
        device=choices.device,
        dtype=choices.dtype,
        max_bytes=config.bank_bytes,
        min_slots=config.max_running + 1,
    )
    runner = CausalRunner(checked.decoder, cache, bank, choices.device, choices.num_threads)
    return _Parts(
        runner,
        bank,
        checked.linears,
        per_token,
        max_context,
        checked.bit_identical,
        (
            context_reason(max_context, limit),
            attention_reason,
            kv_reason,
            checked.reason,
            *why,
        ),
    )


def _on_device(
    config: ServerConfig, choices: Choices, model: Any, sites: Mapping[str, int]
) -> _Parts:
    expected = reference(model)
    shapes, rules = discover(model)
    limit = context_limit(model.config, rules)
    runtime = DeviceRuntime.choose(shapes, choices.device, choices.dtype, choices.num_threads)
    per_token = kv_bytes_per_token(shapes, choices.dtype)
    max_context, num_tokens = context_and_cache(
        config, choices.device, per_token, limit, runtime.attention.block_size
    )
    cache = runtime.make_cache(shapes, num_tokens)
    attach(model, cache)
    engine = runtime.assemble(
        model, rules, cache, sites, expected,
        max_running=config.max_running, max_context=max_context, bank_bytes=config.bank_bytes,
    )  # fmt: skip
    return _Parts(
        engine.runner, engine.bank, linears_of(model), per_token, max_context,
        engine.bit_identical,
        (
            context_reason(max_context, limit),
            *engine.reasons,
            *choose_precision(config.quantization, False, lambda: False)[1],
        ),
    )  # fmt: skip
