"""Which products `--quantization` means on this CPU, and why."""

from collections.abc import Callable

import llvmlite.binding
import numba

from redmux.errors import FailedPreconditionError
from redmux_server.config import ServerConfig
from redmux_server.models.cpu.arithmetic import HAS_AVX2, HAS_BF16
from redmux_server.models.cpu.tile_permission import why_no_tiles

# What `auto` may cost: the rise of perplexity on any text of docs/performance.md, 1.1 % in int8.
MAX_LOSS = "1 % of perplexity"


def check_not_rounded(config: ServerConfig, kind: str) -> None:
    """Raises FailedPreconditionError where what only decoders round is asked for; `kind` is not."""
    if config.quantization not in ("none", "auto"):
        raise FailedPreconditionError(
            f"quantization is {config.quantization}, which serves decoders; use none for {kind}"
        )
    if config.kv_dtype not in ("float32", "auto"):
        raise FailedPreconditionError(
            f"kv_dtype is {config.kv_dtype}, which serves decoders; use auto for {kind}"
        )


def choose_precision(
    quantization: str, is_fp32: bool, is_on_grids: Callable[[], bool]
) -> tuple[str, list[str]]:
    """Returns none, bf16, int8 or int4 for what was asked, and the reasons, if anything was.

    `is_fp32` tells whether a model is computed in fp32, without which nothing is quantized, and
    `is_on_grids` whether its weights have 4 bits as they are: others lose more in int4 than
    `auto` may.
    """
    if quantization == "none":
        return "none", []
    if not is_fp32:
        return "none", [f"quantization none ({quantization}: only products of fp32 are quantized)"]
    refusal = why_no_tiles()
    tiles = "tiles: AMX" if refusal is None else f"tiles: none, {refusal}"
    if quantization != "auto":
        return quantization, [f"quantization {quantization} (set by configuration)", tiles]
    within = f"the fastest within {MAX_LOSS}"
    if refusal is None:
        return "bf16", [f"quantization bf16 (auto: in tiles {within})", tiles]
    if HAS_BF16 and _multiplies_bf16_at_twice_the_rate():
        return "bf16", [f"quantization bf16 (auto: this CPU's vectors of it are {within})", tiles]
    if HAS_AVX2 and is_on_grids():
        why = f"without tiles 4-bit weights, which the model has, are {within}"
        return "int4", [f"quantization int4 (auto: {why})", tiles]
    return "none", [f"quantization none (auto: without tiles fp32 is {within})", tiles]


def choose_kv_dtype(kv_dtype: str, quantization: str, dtype: str) -> tuple[str, str]:
    """Returns what keys and values of a model of this dtype are rounded to, and the reason.

    `quantization` is what `choose_precision` gives for it.
    """
    why = "set by configuration"
    if kv_dtype != "auto":
        dtype = kv_dtype
    elif quantization != "none":
        dtype, why = "bfloat16", "auto: products are rounded, too"
    else:
        why = "auto: as the rest"
    return dtype, f"keys and values {dtype} ({why})"


def _multiplies_bf16_at_twice_the_rate() -> bool:
    """Whether vectors of bf16 are faster than those of fp32, as on AMD since Zen 4.

    On Intel's CPUs with AMX they have less than half of fp32's rate.
    """
    name: str = numba.config.CPU_NAME or llvmlite.binding.get_host_cpu_name()
    return name.startswith("znver")
