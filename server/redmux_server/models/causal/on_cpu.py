"""Make a decoder ready on a CPU, fused where that works, and check it against its plain self."""

import contextlib
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from redmux.errors import FailedPreconditionError
from redmux_server.device import Choices
from redmux_server.engine.bank import AdapterBank
from redmux_server.models.causal.attention import attach
from redmux_server.models.causal.runner import CausalRunner, Decoder, TransformersDecoder
from redmux_server.models.causal.selfcheck import (
    MIN_CACHE_TOKENS,
    ROUNDED_TOLERANCE,
    Reference,
    SelfCheck,
    reference,
)
from redmux_server.models.causal.torch_kvcache import TorchKVCache
from redmux_server.models.cpu.accelerate import pack_linears, unmap
from redmux_server.models.cpu.fused_decoder import FusedDecoder, pack, why_not_fusable
from redmux_server.models.cpu.kvcache import NumbaKVCache
from redmux_server.models.cpu.packed_linear import PackedLinear
from redmux_server.models.cpu.packing import Packing
from redmux_server.models.cpu.phases import counters_of
from redmux_server.models.cpu.reservation import Reservation
from redmux_server.models.kvcache import BLOCK, KVCache, LayerRule, LayerShape

logger = logging.getLogger(__name__)

_PRECISIONS = {
    "none": "fp32",
    "bf16": "bf16 weights and activations",
    "int8": "int8 weights and activations",
    "int4": "int4 weights, int8 head and activations",
}
_LINEARS = PackedLinear | nn.Linear | Conv1D


def pack_and_run(
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


def make_cache(
    shapes: Sequence[LayerShape], num_blocks: int, choices: Choices, kv_dtype: torch.dtype
) -> tuple[KVCache, str]:
    """Returns the cache of these layers, and what computes attention with it."""
    cache: KVCache
    if choices.dtype != torch.float32:
        cache = TorchKVCache(shapes, num_blocks, choices.device, choices.dtype)
        return cache, "attention: torch over gathered blocks (not fp32)"
    cache = NumbaKVCache(shapes, num_blocks, kv_dtype)
    return cache, "attention: exact-length paged kernel"


@dataclass(frozen=True, slots=True)
class Checked:
    """A decoder that computes what the plain model computes."""

    decoder: Decoder
    linears: Sequence[nn.Module]
    bit_identical: bool
    reason: str


def fuse(
    model: Any, packing: Packing | None, rules: Sequence[LayerRule], cache: KVCache,
    sites: Mapping[str, int], expected: Reference, choices: Choices, quantization: str,
) -> Checked | None:  # fmt: skip
    """Returns the model as a FusedDecoder, its own layers released, or None where that fails."""
    if packing is None:
        return None
    assert isinstance(cache, NumbaKVCache), "only fp32 is packed"
    exact = cache.exact(MIN_CACHE_TOKENS // BLOCK)
    decoder = FusedDecoder(model, rules, exact, packing)
    try:
        error, bit_identical = _check(decoder, exact, sites, expected, choices)
    except FailedPreconditionError as err:
        logger.warning("not fused: %s", err)
        return None
    tolerance = _tolerance(quantization, cache)
    if tolerance:  # only now: what is rounded would hide what else is wrong
        if quantization != "none":
            packing = pack(model, quantization)
        decoder = FusedDecoder(model, rules, cache, packing, decoder.embeddings)
        error, bit_identical = _check(decoder, cache, sites, expected, choices, tolerance)
    linears = decoder.linears
    model.model.layers = nn.ModuleList()
    model.lm_head = nn.Identity()
    model.set_input_embeddings(nn.Identity())
    unmap(model)
    products = f"{len(linears)} packed products, {_PRECISIONS[quantization]}"
    if quantization == "int4":
        products += f" ({packing.num_exact} with all weights as they were loaded)"
    return Checked(decoder, linears, bit_identical, f"layers: fused, {products}, {_off_by(error)}")


def keep(
    model: Any, cache: KVCache, sites: Mapping[str, int], expected: Reference, choices: Choices,
    quantization: str,
) -> Checked:  # fmt: skip
    """Returns the model as transformers runs it; raises FailedPreconditionError if it cannot be."""
    decoder = TransformersDecoder(model)
    tolerance = None
    if choices.dtype != torch.float32:
        reason = "linears: torch's own (not fp32)"
    else:
        tolerance = _tolerance(quantization, cache)
        if tolerance:
            exact = _exact(cache)
            attach(model, exact)
            _check(decoder, exact, sites, expected, choices)
        count = pack_linears(model, "fp32" if quantization == "none" else quantization)
        reason = f"linears: {count} packed, {_PRECISIONS[quantization]}"
    attach(model, cache)
    error, bit_identical = _check(decoder, cache, sites, expected, choices, tolerance)
    # No product of torch's promises that, whatever a few steps show.
    bit_identical &= not decoder.computes_in_torch
    return Checked(decoder, linears_of(model), bit_identical, f"{reason}, {_off_by(error)}")


def _tolerance(quantization: str, cache: KVCache) -> float | None:
    """Returns by how much logits may differ where something is rounded, None where nothing is."""
    if quantization != "none":
        return ROUNDED_TOLERANCE[quantization]
    return ROUNDED_TOLERANCE["bf16"] if _exact(cache) is not cache else None


def _exact(cache: KVCache) -> KVCache:
    """Returns what the check needs of a cache that does not round: this one where it does not."""
    return cache.exact(MIN_CACHE_TOKENS // BLOCK) if isinstance(cache, NumbaKVCache) else cache


def _off_by(error: float) -> str:
    return f"logits within {error:.1e} of the plain model's largest"


def linears_of(model: nn.Module) -> list[nn.Module]:
    """Returns the model's matrix products, in the order of its modules."""
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
        found = check.compare(expected, tolerance), check.is_bit_identical(expected.prompts)
    if isinstance(cache, NumbaKVCache):
        cache.give_back()
    return found
