"""Load the base model and make it ready to serve: attention, cache, kernels, self-check."""

import contextlib
import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from redmux.errors import FailedPreconditionError, InvalidArgumentError
from redmux_adapters import editable_sites, fingerprint, load_base, with_layer_norms
from redmux_server.config import ServerConfig
from redmux_server.device import Choices
from redmux_server.engine.bank import AdapterBank
from redmux_server.engine.engine import Runner
from redmux_server.models.accelerate import pack_linears, unmap
from redmux_server.models.attention import LayerRule, attach, discover
from redmux_server.models.context_limit import ContextLimit, context_limit
from redmux_server.models.device_runtime import DeviceRuntime
from redmux_server.models.fused import FusedDecoder, pack, why_not_fusable
from redmux_server.models.kvcache import KVCache, LayerShape, NumbaKVCache, TorchKVCache
from redmux_server.models.packed_linear import PackedLinear, Packing
from redmux_server.models.paged_attention import BLOCK
from redmux_server.models.phases import counters_of
from redmux_server.models.reservation import Reservation
from redmux_server.models.runner import CachedRunner, CausalRunner, Decoder, TransformersDecoder
from redmux_server.models.selfcheck import (
    ROUNDED_TOLERANCE,
    Reference,
    SelfCheck,
    min_cache_tokens,
    reference,
)
from redmux_server.models.text import TextCodec

logger = logging.getLogger(__name__)

_DEFAULT_CACHE_BYTES = 2 << 30
_DEFAULT_IDLE_BYTES = 128 << 20
_PRECISIONS = {
    "none": "fp32",
    "bf16": "bf16 weights and activations",
    "int8": "int8 weights and activations",
}
_LINEARS = PackedLinear | nn.Linear | Conv1D


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
    linears: Sequence[nn.Module]  # the matrix products of a step, in the order of running
    bit_identical: bool
    reasons: Sequence[str]
    max_idle_blocks: int | None = None  # kept for later prompts; None bounds nothing
    decoder_start: int | None = None  # of an encoder-decoder: what its decoder starts with


def load_causal(
    config: ServerConfig, choices: Choices, reservation: Reservation | None = None
) -> BaseModel:
    """Returns the configured model, loaded, accelerated and checked against its plain self.

    `reservation` is of memory for this model's weights.

    Raises InvalidArgumentError if it cannot be found and FailedPreconditionError if its
    architecture cannot be served rightly.
    """
    model, tokenizer = load_base(config.model, choices.dtype)
    model = model.to(choices.device)
    identity = fingerprint(model)
    sites = with_layer_norms(editable_sites(model))
    vocab_size = model.get_input_embeddings().weight.shape[0]
    if choices.device.type == "cpu":
        parts = _on_cpu(config, choices, model, sites, reservation)
    else:
        parts = _on_device(config, choices, model, sites)
    block_bytes = parts.runner.cache.block_size * parts.kv_bytes_per_token
    max_idle = _max_idle(config, choices.device, block_bytes)
    reasons = [
        *choices.reasons,
        *parts.reasons,
        "bit-identical in any batch: yes, checked at start"
        if parts.bit_identical
        else "bit-identical in any batch: no, logits may differ in their last bits",
        _prefix_reason(config, parts.runner.cache, max_idle),
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
        linears=parts.linears,
        bit_identical=parts.bit_identical,
        reasons=reasons,
        max_idle_blocks=max_idle,
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
    packing, expected = _pack_and_run(model, choices, reservation)
    shapes, rules = discover(model)
    limit = context_limit(model.config, rules)
    max_context, num_tokens = _context_and_cache(config, model, shapes, limit)
    cache, attention_reason = _make_cache(shapes, num_tokens // BLOCK, choices)
    quantization = config.quantization
    checked = _fuse(model, packing, rules, cache, sites, expected, choices, quantization) or _keep(
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
    reasons = (_context_reason(max_context, limit), attention_reason, checked.reason)
    return _Parts(
        runner, bank, checked.linears, _kv_bytes_per_token(shapes, choices.dtype), max_context,
        checked.bit_identical, reasons,
    )  # fmt: skip


def _pack_and_run(
    model: Any, choices: Choices, reservation: Reservation | None
) -> tuple[Packing | None, Reference]:
    """Returns the model's products packed, None for a model that is not fused, and its logits.

    Both at once: reading weights that lie on disk and finding memory for others is mostly waiting.
    """
    if choices.dtype != torch.float32 or why_not_fusable(model):
        return None, reference(model)

    def packed() -> Packing:
        counters_of(1, 1)  # at the first call of a kernel numba reads its tables, half a second
        return pack(model, room=reservation.take() if reservation else None)

    with ThreadPoolExecutor(1, "packing") as thread:
        packing = thread.submit(packed)
        expected = reference(model)
        return packing.result(), expected


def _on_device(
    config: ServerConfig, choices: Choices, model: Any, sites: Mapping[str, int]
) -> _Parts:
    expected = reference(model)
    shapes, rules = discover(model)
    limit = context_limit(model.config, rules)
    runtime = DeviceRuntime.choose(shapes, choices.device, choices.dtype, choices.num_threads)
    max_context, num_tokens = _context_and_cache(
        config, model, shapes, limit, runtime.attention.block_size
    )
    cache = runtime.make_cache(shapes, num_tokens)
    attach(model, cache)
    engine = runtime.assemble(
        model, rules, cache, sites, expected,
        max_running=config.max_running, max_context=max_context, bank_bytes=config.bank_bytes,
    )  # fmt: skip
    return _Parts(
        engine.runner, engine.bank, _linears(model),
        _kv_bytes_per_token(shapes, choices.dtype), max_context, engine.bit_identical,
        (_context_reason(max_context, limit), *engine.reasons),
    )  # fmt: skip


def _context_and_cache(
    config: ServerConfig, model: Any, shapes: Sequence[LayerShape], limit: ContextLimit,
    block_size: int = BLOCK,
) -> tuple[int, int]:  # fmt: skip
    """Returns (most tokens of a request, tokens in the cache, a multiple of `block_size`)."""
    context = config.max_context or limit.num_tokens
    if context > limit.num_tokens:
        raise InvalidArgumentError(
            f"max_context is {context}, but can be {limit.num_tokens} at most: {limit.reason}"
        )
    per_token = _kv_bytes_per_token(shapes, model.dtype)
    tokens = config.kv_cache_tokens
    if not tokens:
        num_bytes = _free_bytes(model.device) // 4
        if model.device.type == "cpu":
            num_bytes = min(_DEFAULT_CACHE_BYTES, num_bytes)
        whole_requests = config.max_running * -(-context // block_size) * block_size
        tokens = max(min(num_bytes // per_token, whole_requests), min_cache_tokens(block_size))
    tokens = -(-tokens // block_size) * block_size
    return min(context, tokens), tokens


def _context_reason(max_context: int, limit: ContextLimit) -> str:
    why = limit.reason if max_context == limit.num_tokens else "set, or all that the cache holds"
    return f"context: {max_context} tokens, {why}"


def _kv_bytes_per_token(shapes: Sequence[LayerShape], dtype: torch.dtype) -> int:
    return sum(2 * s.num_kv_heads * s.head_dim for s in shapes) * dtype.itemsize


def _max_idle(config: ServerConfig, device: torch.device, block_bytes: int) -> int | None:
    """Returns how many blocks may wait for later prompts, or None for all of them."""
    if config.prefix_cache_bytes or device.type == "cpu":
        return (config.prefix_cache_bytes or _DEFAULT_IDLE_BYTES) // block_bytes
    return None


def _prefix_reason(config: ServerConfig, cache: KVCache, max_idle: int | None) -> str:
    if not config.prefix_cache:
        return "prefix cache: off (set by configuration)"
    num_idle = cache.num_blocks if max_idle is None else min(cache.num_blocks, max_idle)
    return (
        f"prefix cache: on, keeps {num_idle * cache.block_size} tokens in blocks of "
        f"{cache.block_size}, never shared by tenants or adapters"
    )


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] * 3  # the GPU is ours: take three quarters
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _make_cache(
    shapes: Sequence[LayerShape], num_blocks: int, choices: Choices
) -> tuple[KVCache, str]:
    cache: KVCache
    if choices.dtype != torch.float32:
        cache = TorchKVCache(shapes, num_blocks, choices.device, choices.dtype)
        return cache, "attention: torch over gathered blocks (not fp32)"
    cache = NumbaKVCache(shapes, num_blocks)
    return cache, "attention: exact-length paged kernel"


@dataclass(frozen=True, slots=True)
class _Checked:
    """A decoder that computes what the plain model computes."""

    decoder: Decoder
    linears: Sequence[nn.Module]
    bit_identical: bool
    reason: str


def _fuse(
    model: Any, packing: Packing | None, rules: Sequence[LayerRule], cache: KVCache,
    sites: Mapping[str, int], expected: Reference, choices: Choices, quantization: str,
) -> _Checked | None:  # fmt: skip
    """Returns the model as a FusedDecoder, its own layers released, or None where that fails."""
    if packing is None:
        return None
    assert isinstance(cache, NumbaKVCache), "only fp32 is packed"
    decoder = FusedDecoder(model, rules, cache, packing)
    try:
        error, bit_identical = _check(decoder, cache, sites, expected, choices)
    except FailedPreconditionError as err:
        logger.warning("not fused: %s", err)
        return None
    if quantization != "none":  # only now: rounded weights would hide what else is wrong
        decoder = FusedDecoder(model, rules, cache, pack(model, quantization))
        tolerance = ROUNDED_TOLERANCE[quantization]
        error, bit_identical = _check(decoder, cache, sites, expected, choices, tolerance)
    linears = decoder.linears
    model.model.layers = nn.ModuleList()
    model.lm_head = nn.Identity()
    if not decoder.needs_embeddings:
        model.set_input_embeddings(nn.Identity())
    unmap(model)
    products = f"{len(linears)} packed products, {_PRECISIONS[quantization]}"
    return _Checked(decoder, linears, bit_identical, f"layers: fused, {products}, {_off_by(error)}")


def _keep(
    model: Any, cache: KVCache, sites: Mapping[str, int], expected: Reference, choices: Choices,
    quantization: str,
) -> _Checked:  # fmt: skip
    """Returns the model as transformers runs it; raises FailedPreconditionError if it cannot be."""
    attach(model, cache)
    decoder = TransformersDecoder(model)
    tolerance = None
    if choices.dtype != torch.float32:
        reason = "linears: torch's own (not fp32)"
    else:
        if quantization != "none":
            _check(decoder, cache, sites, expected, choices)
            tolerance = ROUNDED_TOLERANCE[quantization]
        count = pack_linears(model, "fp32" if quantization == "none" else quantization)
        reason = f"linears: {count} packed, {_PRECISIONS[quantization]}"
    error, bit_identical = _check(decoder, cache, sites, expected, choices, tolerance)
    # No product of torch's promises that, whatever a few steps show.
    bit_identical &= not decoder.computes_in_torch
    return _Checked(decoder, _linears(model), bit_identical, f"{reason}, {_off_by(error)}")


def _off_by(error: float) -> str:
    return f"logits within {error:.1e} of the plain model's largest"


def _linears(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, _LINEARS)]


def _check(
    decoder: Decoder, cache: KVCache, sites: Mapping[str, int], expected: Reference,
    choices: Choices, tolerance: float | None = None,
) -> tuple[float, bool]:  # fmt: skip
    """Returns the decoder's largest error and whether it is bit-identical in any batch.

    Raises FailedPreconditionError if the error is too large.
    """

    def make(bank: AdapterBank) -> CausalRunner:
        return CausalRunner(decoder, cache, bank, choices.device, choices.num_threads)

    with contextlib.closing(SelfCheck(make, sites, choices.device, choices.dtype)) as check:
        return check.compare(expected, tolerance), check.is_bit_identical(expected.prompts)
