"""Load the base model and make it ready to serve: attention, cache, kernels, self-check."""

import contextlib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from redmux.errors import InvalidArgumentError
from redmux_adapters import editable_sites, fingerprint, load_base
from redmux_server.config import ServerConfig
from redmux_server.device import Choices
from redmux_server.engine.bank import AdapterBank
from redmux_server.models.accelerate import can_pack, pack_linears
from redmux_server.models.attention import attach, discover
from redmux_server.models.editing import Editing
from redmux_server.models.kvcache import KVCache, LayerShape, NumbaKVCache, TorchKVCache
from redmux_server.models.paged_attention import BLOCK
from redmux_server.models.quantized import int8_linears
from redmux_server.models.runner import CausalRunner
from redmux_server.models.selfcheck import INT8_TOLERANCE, MIN_CACHE_TOKENS, SelfCheck, reference
from redmux_server.models.text import TextCodec

logger = logging.getLogger(__name__)

_DEFAULT_CACHE_BYTES = 2 << 30


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A model that is ready to serve, and what the rest of the server must know of it."""

    runner: CausalRunner
    bank: AdapterBank
    codec: TextCodec
    fingerprint: str
    architecture: str
    sites: Mapping[str, int]  # editable module path -> output size
    vocab_size: int
    max_context: int
    num_blocks: int
    bit_identical: bool
    reasons: Sequence[str]


def load_causal(config: ServerConfig, choices: Choices) -> BaseModel:
    """Returns the configured model, loaded, accelerated and checked against its plain self.

    Raises InvalidArgumentError if it cannot be found and FailedPreconditionError if its
    architecture cannot be served rightly.
    """
    model, tokenizer = load_base(config.model, choices.dtype)
    model = model.to(choices.device)
    identity = fingerprint(model)
    sites = editable_sites(model)
    expected = reference(model)
    shapes = discover(model)
    max_context, num_tokens = _context_and_cache(config, model, shapes)
    cache, attention_reason = _make_cache(shapes, num_tokens // BLOCK, choices)
    attach(model, cache)
    reasons = [*choices.reasons, attention_reason]
    with contextlib.closing(SelfCheck(model, cache, sites, choices.num_threads)) as check:
        if config.quantization == "int8":
            check.compare(expected)  # rounded weights would hide what else is wrong
            reasons.append(_quantize(model))
            error = check.compare(expected, INT8_TOLERANCE)
            reasons.append(f"int8 logits differ from fp32 by {error:.1%} of the largest at most")
        else:
            reasons.append(_accelerate(model, choices))
            check.compare(expected)
        bit_identical = check.is_bit_identical(expected.prompts)
    reasons.append(
        "bit-identical in any batch: yes, checked at start"
        if bit_identical
        else "bit-identical in any batch: no, logits may differ in their last bits"
    )
    for reason in reasons:
        logger.info("%s", reason)
    bank = AdapterBank(
        sites,
        device=choices.device,
        dtype=choices.dtype,
        max_bytes=config.bank_bytes,
        min_slots=config.max_running + 1,
    )
    return BaseModel(
        runner=CausalRunner(model, cache, Editing(model), bank, choices.num_threads),
        bank=bank,
        codec=TextCodec(tokenizer, model.generation_config),
        fingerprint=identity,
        architecture=model.config.architectures[0],
        sites=sites,
        vocab_size=model.get_input_embeddings().weight.shape[0],
        max_context=max_context,
        num_blocks=cache.num_blocks,
        bit_identical=bit_identical,
        reasons=reasons,
    )


def _context_and_cache(
    config: ServerConfig, model: Any, shapes: Sequence[LayerShape]
) -> tuple[int, int]:
    """Returns (most tokens of a request, tokens in the cache, a multiple of BLOCK)."""
    model_limit = int(getattr(model.config, "max_position_embeddings", 0) or 1 << 20)
    context = config.max_context or model_limit
    if context > model_limit:
        raise InvalidArgumentError(
            f"max_context is {context}, but the model's positions end at {model_limit}"
        )
    per_token = sum(2 * s.num_kv_heads * s.head_dim for s in shapes) * model.dtype.itemsize
    tokens = config.kv_cache_tokens
    if not tokens:
        tokens = min(_DEFAULT_CACHE_BYTES, _free_bytes(model.device) // 4) // per_token
        tokens = max(min(tokens, config.max_running * context), MIN_CACHE_TOKENS)
    tokens = -(-tokens // BLOCK) * BLOCK
    return min(context, tokens), tokens


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] * 3  # the GPU is ours: take three quarters
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _make_cache(
    shapes: Sequence[LayerShape], num_blocks: int, choices: Choices
) -> tuple[KVCache, str]:
    if choices.device.type != "cpu" or choices.dtype != torch.float32:
        cache: KVCache = TorchKVCache(shapes, num_blocks, choices.device, choices.dtype)
        return cache, "attention: torch over gathered blocks (not fp32 on a CPU)"
    if any(s.head_dim % 4 for s in shapes):
        cache = TorchKVCache(shapes, num_blocks, choices.device, choices.dtype)
        return cache, "attention: torch over gathered blocks (head size is no multiple of 4)"
    return NumbaKVCache(shapes, num_blocks), "attention: exact-length paged kernel"


def _quantize(model: Any) -> str:
    make_linear, reason = int8_linears()
    return f"linears: {pack_linears(model, make_linear)} with {reason}"


def _accelerate(model: Any, choices: Choices) -> str:
    if choices.device.type != "cpu" or choices.dtype != torch.float32:
        return "linears: torch's own (not fp32 on a CPU)"
    if not can_pack():
        return "linears: torch's own (this build has no oneDNN)"
    return f"linears: {pack_linears(model)} packed for oneDNN"
