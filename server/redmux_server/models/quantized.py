"""Int8 linear layers for the CPU whose rows never depend on each other."""

import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from redmux.errors import FailedPreconditionError

_WEIGHT_LEVELS = 127
# Steps of an activation to either side of zero. Without VNNI a CPU adds two products in 16 bits
# that saturate: with 63 steps and their offset 2 * 126 * 127 still fits, with 127 it does not.
_FINE, _COARSE = 127, 63
# Longest row whose sum of products fits in 32 bits, at 254 for an activation with its offset.
MAX_IN_FEATURES = (2**31 - 1) // (2 * _FINE * _WEIGHT_LEVELS)
_SMALLEST_STEP = 1e-30  # far below what any sum of products can show; keeps zeros from 0 / 0


class Int8Linear(nn.Module):
    """A frozen linear layer on the CPU with int8 weights and, within it, int8 activations.

    Weights have one step for each output channel, activations one for each row: FBGEMM's own
    dynamic quantisation takes one for the whole tensor, where one tenant's outlier ruins its
    neighbours. Rows are rounded to whole steps here, and products of whole numbers sum exactly
    in any order, so a row has the same bits whatever its neighbours, their number, the threads.

    63 levels alone would cost a language model much of its quality, so there the rest of every
    activation is rounded in its turn and multiplied as a second row: slower, and finer than 127.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, levels: int) -> None:
        """`weight` is fp32 [out_features, in_features]; `levels` is what `exact_levels` returns.

        Raises FailedPreconditionError for more than MAX_IN_FEATURES.
        """
        super().__init__()
        self.out_features, self.in_features = weight.shape
        if self.in_features > MAX_IN_FEATURES:
            raise FailedPreconditionError(
                f"a linear layer has {self.in_features} inputs, int8 can sum {MAX_IN_FEATURES} "
                f"at most; use quantization none"
            )
        self.packed = _pack(weight)
        self.bias = bias
        self._levels = levels

    def forward(self, x: Tensor) -> Tensor:
        """Takes [..., in_features], returns [..., out_features]; a row not finite stays so."""
        rows = x.reshape(-1, self.in_features)
        step = rows.abs().amax(1, keepdim=True).div_(self._levels).clamp_min_(_SMALLEST_STEP)
        y = self._multiply(rows / step).mul_(step)
        if self.bias is not None:
            y.add_(self.bias)
        return y.view(*x.shape[:-1], self.out_features)

    def _multiply(self, steps: Tensor) -> Tensor:
        """Takes activations [n, in_features] in steps of their row."""
        if self._levels == _FINE:
            return _product(steps.round_(), self.packed, self._levels)
        whole = steps.round()
        rest = steps.sub_(whole).mul_(2 * self._levels).round_()
        y = _product(torch.cat([whole, rest]), self.packed, self._levels)
        return torch.add(*y.chunk(2), alpha=1 / (2 * self._levels))


def _pack(weight: Tensor) -> torch.ScriptObject:
    """Rounds `weight` [out, in] to int8, one step for each output, in FBGEMM's layout."""
    steps = weight.abs().amax(1).div(_WEIGHT_LEVELS).clamp_min(_SMALLEST_STEP).double()
    zeros = torch.zeros(len(steps), dtype=torch.long)
    with warnings.catch_warnings():
        # Tensors of a quantised type are deprecated, but the operators take no other weight.
        warnings.filterwarnings("ignore", message=".*quantized tensor", category=UserWarning)
        values = torch.quantize_per_channel(weight, steps, zeros, 0, torch.qint8)
    packed: torch.ScriptObject = torch.ops.quantized.linear_prepack(values, None)
    return packed


def _product(rows: Tensor, packed: torch.ScriptObject, levels: int) -> Tensor:
    """rows @ weight.T in fp32, for rows of whole numbers from -levels to levels."""
    y: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
        rows, 1.0, levels, packed
    )
    return y


def can_quantize() -> bool:
    """Whether this build of torch has FBGEMM's int8 operators on this CPU."""
    return torch.backends.quantized.engine in ("x86", "fbgemm") and hasattr(
        torch.ops.quantized, "linear_with_input_q_dq_qweight_dq_output_fp32"
    )


def exact_levels() -> int:
    """Returns how many activation levels to either side of zero this CPU multiplies exactly.

    Raises FailedPreconditionError where int8 products are missing or wrong for every choice.
    """
    if not can_quantize():
        raise FailedPreconditionError(
            "quantization is int8, but this build of torch has no FBGEMM; use quantization none"
        )
    for levels in (_FINE, _COARSE):
        if _is_exact(levels):
            return levels
    raise FailedPreconditionError(
        "quantization is int8, but int8 products are wrong on this CPU; use quantization none"
    )


def _is_exact(levels: int) -> bool:
    """Whether products of the largest values, of one sign and mixed, are the whole numbers."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-1, 2, (40, 64), generator=generator).float() * _WEIGHT_LEVELS
    rows = torch.randint(-1, 2, (9, 64), generator=generator).float() * levels
    weight[0], rows[0] = _WEIGHT_LEVELS, levels
    weight[1:, 0] = _WEIGHT_LEVELS  # every channel reaches the largest value: steps of 1
    return torch.equal(_product(rows, _pack(weight), levels), rows @ weight.t())


def int8_linears() -> tuple[Callable[[Tensor, Tensor | None], Int8Linear], str]:
    """Returns what makes an Int8Linear of a weight and a bias on this CPU, and the reason.

    Raises what `exact_levels` raises.
    """
    levels = exact_levels()
    why = (
        "activations of 8 bits"
        if levels == _FINE
        else "activations of 2 x 7 bits (this CPU has no exact products of 8)"
    )
    return partial(Int8Linear, levels=levels), f"int8 weights, {why}"
