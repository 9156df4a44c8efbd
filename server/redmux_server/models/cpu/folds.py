"""Sums and maxima of a row, lane by lane: the order of operations depends on positions alone.

A compiler keeps a plain loop over a sum in its order, one element after the other, or, if it may
reorder it, in one that depends on the length.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from redmux_server.models.cpu.arithmetic import FLOAT, INDEX, INT32, declare
from redmux_server.models.cpu.compiled import compiled

LANES = 32  # four AVX2 registers: as many as hide how long an addition takes


def _add(builder: Any, left: Any, right: Any) -> Any:
    return builder.fadd(left, right)


def _add_product(builder: Any, total: Any, left: Any, right: Any) -> Any:
    fma = declare(builder, f"llvm.fma.v{LANES}f32", *[left.type] * 4)
    return builder.call(fma, [left, right, total])


def _larger(builder: Any, left: Any, right: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", left, right), left, right)


def _fold(
    count: int, first: float, take: Callable[..., Any], join: Callable[..., Any] | None = None
) -> Any:
    """Returns what folds `count` arrays of fp32: lanes start from `first` and take LANES a time.

    Then one half of the lanes joins the other until one is left. A rest of the arrays that does
    not fill all lanes is left out.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        arrays = [
            context.make_array(kind)(context, builder, value)
            for kind, value in zip(sig.args, args, strict=True)
        ]
        vector = ir.VectorType(FLOAT, LANES)
        data = [builder.bitcast(array.data, vector.as_pointer()) for array in arrays]
        so_far = cgutils.alloca_once_value(builder, vector([first] * LANES))
        with cgutils.for_range(builder, builder.udiv(arrays[0].nitems, INDEX(LANES))) as loop:
            lanes = [builder.load(builder.gep(x, [loop.index]), align=4) for x in data]
            builder.store(take(builder, builder.load(so_far), *lanes), so_far)
        folded = builder.load(so_far)
        width = LANES // 2
        while width > 0:
            low, high = (
                builder.shuffle_vector(
                    folded, folded,
                    ir.Constant(ir.VectorType(INT32, width), list(range(at, at + width))),
                )
                for at in (0, width)
            )  # fmt: skip
            folded = (join or take)(builder, low, high)
            width //= 2
        return builder.extract_element(folded, INT32(0))

    @intrinsic
    def fold(typing, x):
        return types.float32(x), codegen

    @intrinsic
    def fold_both(typing, x, y):
        return types.float32(x, y), codegen

    return fold if count == 1 else fold_both


# Of arrays whose size is a multiple of LANES.
largest = _fold(1, -np.inf, _larger)
total = _fold(1, 0.0, _add)
_products = _fold(2, 0.0, _add_product, _add)


@compiled
def dot(x, y):
    """Returns the sum of the products of x and y, both of one size, any."""
    result = _products(x, y)
    for d in range(x.size // LANES * LANES, x.size):
        result += x[d] * y[d]
    return result


@compiled
def sum_squares(x):
    """Returns the sum of the squares of x, of any size."""
    return dot(x, x)
