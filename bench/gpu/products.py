"""The few-row products alone: against fp32 arithmetic, and their speed beside torch's own."""

import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from checks import TOLERANCE
from rig import SHAPES
from torch import Tensor

from redmux_server.models.cuda.decode_ways import cuda_seconds
from redmux_server.models.cuda.few_rows import kinds
from redmux_server.models.cuda.graphed_decode import CudaCapture

Row = dict[str, Any]
EPS = 1e-5
_READ_BYTES = 1 << 29  # of different weights in one measurement: far beyond every cache


@torch.inference_mode()
def check(device: torch.device) -> list[Row]:
    """Every product in a row, as a layer has them, against the formulas in fp32.

    Sizes are no multiples of a program's share, and some rows are the identity. Up to 16 rows are
    one compilation; only bf16 has more of them here.
    """
    rows = []
    hidden, inner = 1000, 2072
    for dtype in TOLERANCE:
        for kind, few in kinds(hidden, EPS, dtype, device).items():
            for num_rows in (1, 7, 16, 17, 64) if dtype == torch.bfloat16 else (1, 7, 16):
                error = _layer_error(few, num_rows, hidden, inner, dtype, device)
                assert error < TOLERANCE[dtype], f"{kind}, {dtype}, {num_rows}: {error:.1e}"
                rows.append({"kind": kind, "dtype": str(dtype)[6:], "rows": num_rows,
                             "max error": f"{error:.1e}"})  # fmt: skip
    return rows


def _layer_error(
    few: Any, num_rows: int, hidden: int, inner: int, dtype: torch.dtype, device: torch.device
) -> float:
    """Returns the largest error of a projection, a gate, and an addition that is normed again."""
    generator = torch.Generator(device).manual_seed(num_rows)

    def randn(*shape: int, mean: float = 0.0) -> Tensor:
        return (mean + torch.randn(shape, generator=generator, device=device)).to(dtype)

    embedding, ids = randn(99, hidden), torch.arange(num_rows, device=device)
    norm, qkv = randn(hidden, mean=1), randn(1544, hidden) / hidden**0.5
    gate_up, down = randn(2 * inner, hidden) / hidden**0.5, randn(hidden, inner) / inner**0.5
    table = torch.randn(9, 6 * inner, generator=generator, device=device)
    rows = (ids % 9).int()
    residual = few.start(ids, embedding, norm)
    got = [few.project(residual, qkv, None)]
    got.append(few.gate(residual, gate_up, None, table, rows, 3, 3 + 2 * inner))
    few.add(residual, got[1], down, None, norm, table, rows, 5)
    got += [residual.x, few.project(residual, qkv, None)]

    def edited(y: Tensor, start: int) -> Tensor:
        vectors = table[rows.long(), start : start + 2 * y.shape[1]]
        scale, bias = vectors.chunk(2, 1)
        return torch.where(rows[:, None] == 0, y, scale * y + bias)

    x, w = embedding[ids].float(), norm.float()
    h = F.rms_norm(x, (hidden,), w, EPS)
    gate, up = (h @ gate_up.float().T).chunk(2, 1)
    gated = F.silu(edited(gate, 3)) * edited(up, 3 + 2 * inner)
    summed = x + edited(got[1].float() @ down.float().T, 5)  # of what was stored
    again = F.rms_norm(residual.x.float(), (hidden,), w, EPS)
    want = [h @ qkv.float().T, gated, summed, again @ qkv.float().T]
    return max(
        float(((a.float() - b).abs() / b.abs().clamp(min=1)).max())
        for a, b in zip(got, want, strict=True)
    )


@dataclass(frozen=True, slots=True)
class _Product:
    name: str
    width: int  # of the weight, gate and up together
    dim: int


def _products(shape: str) -> Sequence[_Product]:
    options = SHAPES[shape]
    hidden, inner, size = (options[k] for k in ("hidden_size", "intermediate_size", "head_dim"))
    query = options["num_attention_heads"] * size
    return (
        _Product("qkv", query + 2 * options["num_key_value_heads"] * size, hidden),
        _Product("o", hidden, query),
        _Product("gate_up", 2 * inner, hidden),
        _Product("down", hidden, inner),
        _Product("head", options["vocab_size"], hidden),
    )


@torch.inference_mode()
def speeds(shape: str, device: torch.device, dtype: torch.dtype) -> list[Row]:
    """Reads weights of one product after the other from a graph: GB/s by torch and by each kind.

    torch's is the product alone; the others normalise, edit, gate and add in it.
    """
    hidden = SHAPES[shape]["hidden_size"]
    own = kinds(hidden, EPS, dtype, device)
    rows = []
    for product in _products(shape):
        num_bytes = product.width * product.dim * dtype.itemsize
        count = max(2, -(-_READ_BYTES // num_bytes))
        weights = torch.randn((count, product.width, product.dim), dtype=dtype, device=device).mul_(
            product.dim**-0.5
        )
        for batch in (1, 4, 8, 16, 32, 64):
            row: Row = {"product": product.name, "batch": batch}
            inputs = torch.randn(batch, product.dim, dtype=dtype, device=device)
            row["torch GB/s"] = _speed(weights, num_bytes, functools.partial(F.linear, inputs))
            for name, few in own.items():
                row[f"{name} GB/s"] = ""
                if batch <= few.most_rows:
                    call = _call(few, product, inputs, hidden)
                    row[f"{name} GB/s"] = _speed(weights, num_bytes, call)
            rows.append(row)
        del weights
    return rows


def _call(few: Any, product: _Product, inputs: Tensor, hidden: int) -> Callable[[Tensor], object]:
    """Returns what runs this product with one weight; its adapters are one for every row."""
    batch, device = len(inputs), inputs.device
    norm = torch.ones(hidden, dtype=inputs.dtype, device=device)
    embedding = torch.randn(batch, hidden, dtype=inputs.dtype, device=device)
    residual = few.start(torch.arange(batch, device=device), embedding, norm)
    table = torch.zeros(batch + 1, 2 * hidden, device=device)
    rows = torch.arange(1, batch + 1, dtype=torch.int32, device=device)
    if product.name == "gate_up":
        return lambda weight: few.gate(residual, weight, None, table, rows, -1, -1)
    if product.name in ("o", "down"):
        start = 0 if product.name == "down" else -1
        return lambda weight: few.add(residual, inputs, weight, None, norm, table, rows, start)
    return lambda weight: few.project(residual, weight, None)


def _speed(weights: Tensor, num_bytes: int, call: Callable[[Tensor], object]) -> int:
    def launch() -> None:
        for weight in weights:
            call(weight)

    replay = CudaCapture()(launch)
    seconds = statistics.median(cuda_seconds(replay) for _ in range(3))
    return round(len(weights) * num_bytes / seconds / 1e9)
