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

from redmux_server.models.arithmetic import FLOAT, INDEX, INT32, declare
from redmux_server.models.compiled import compiled

LANES = 32  # four AVX2 registers: as many as hide how long an addition takes


def _add(builder: Any, left: Any, right: Any) -> Any:
    return builder.fadd(left, right)


def _add_square(builder: Any, total: Any, lanes: Any) -> Any:
    fma = declare(builder, f"llvm.fma.v{LANES}f32", *[lanes.type] * 4)
    return builder.call(fma, [lanes, lanes, total])


def _larger(builder: Any, left: Any, right: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", left, right), left, right)


def _fold(first: float, take: Callable[..., Any], join: Callable[..., Any] | None = None) -> Any:
    """Returns what folds an array of fp32: lanes start from `first` and take LANES of it a time.

    Then one half of the lanes joins the other until one is left. A rest of the array that does
    not fill all lanes is left out.
    """

    @intrinsic
    def fold(typing, x):
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            array = context.make_array(sig.args[0])(context, builder, args[0])
            vector = ir.VectorType(FLOAT, LANES)
            data = builder.bitcast(array.data, vector.as_pointer())
            so_far = cgutils.alloca_once_value(builder, vector([first] * LANES))
            with cgutils.for_range(builder, builder.udiv(array.nitems, INDEX(LANES))) as loop:
                lanes = builder.load(builder.gep(data, [loop.index]), align=4)
                builder.store(take(builder, builder.load(so_far), lanes), so_far)
            folded = builder.load(so_far)
            count = LANES // 2
            while count > 0:
                low, high = (
                    builder.shuffle_vector(
                        folded, folded,
                        ir.Constant(ir.VectorType(INT32, count), list(range(at, at + count))),
                    )
                    for at in (0, count)
                )  # fmt: skip
                folded = (join or take)(builder, low, high)
                count //= 2
            return builder.extract_element(folded, INT32(0))

        return types.float32(x), codegen

    return fold


# Of an array whose size is a multiple of LANES.
largest = _fold(-np.inf, _larger)
total = _fold(0.0, _add)
_squares = _fold(0.0, _add_square, _add)


@compiled
def sum_squares(x):
    """Returns the sum of the squares of x, of any size."""
    result = _squares(x)
    for d in range(x.size // LANES * LANES, x.size):
        result += x[d] * x[d]
    return result
