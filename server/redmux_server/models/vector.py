"""Building blocks of the CPU kernels: a small matrix product in vector registers, and exp.

Both compute each output element by one fixed chain of operations, so a result does not depend on
which other rows are computed with it.
"""

from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16  # one AVX-512 register of fp32, or two AVX2 ones
_HAS_AVX512 = llvmlite.binding.get_host_cpu_features().get("avx512f", False)
# A product works on ROWS x PANEL sums at a time: as many as the registers hold beside operands.
ROWS, PANEL = (8, 32) if _HAS_AVX512 else (6, 16)

# Contraction to fused multiply-add is the same in every lane; nothing may be reordered.
FASTMATH = {"contract", "nsz"}
_LOG2_E = np.float32(1.44269504088896341)
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)


@njit(fastmath=FASTMATH, inline="always")
def exp(x):
    """exp(x) for x <= 0, relative error 2e-7 (Cephes expf), in a form that vectorises."""
    x = max(x, np.float32(-87.0))
    n = np.floor(x * _LOG2_E + np.float32(0.5))
    r = x - n * _LN2_HIGH - n * _LN2_LOW
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    y = p * r * r + r + np.float32(1.0)
    return y * np.int32((np.int32(n) + 127) << 23).view(np.float32)


def _block_product(rows: int, width: int) -> Any:
    """Returns out[:rows, :width] (+)= a[:rows, :n] @ b[:n, :width], held in vector registers."""

    @intrinsic
    def product(typingctx, a, a_at, a_stride, b, b_at, b_stride, n, out, out_at, out_stride, add):
        arguments = (a, a_at, a_stride, b, b_at, b_stride, n, out, out_at, out_stride, add)

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            vector = ir.VectorType(ir.FloatType(), width)
            a_data, b_data, out_data = (
                context.make_array(sig.args[i])(context, builder, args[i]).data for i in (0, 3, 7)
            )
            fma = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fma.v{width}f32"
            )

            def row(start: Any, stride: Any, r: int) -> Any:
                return builder.add(start, builder.mul(stride, ir.Constant(stride.type, r)))

            def vector_at(data: Any, index: Any) -> Any:
                return builder.bitcast(builder.gep(data, [index]), vector.as_pointer())

            sums = [cgutils.alloca_once(builder, vector) for _ in range(rows)]
            targets = [vector_at(out_data, row(args[8], args[9], r)) for r in range(rows)]
            adds = builder.icmp_signed("!=", args[10], ir.Constant(args[10].type, 0))
            with builder.if_else(adds) as (then, otherwise):
                with then:
                    for total, target in zip(sums, targets, strict=True):
                        builder.store(builder.load(target, align=4), total)
                with otherwise:
                    for total in sums:
                        builder.store(ir.Constant(vector, [0.0] * width), total)
            with cgutils.for_range(builder, args[6]) as loop:
                offset = builder.mul(loop.index, args[5])
                b_row = vector_at(b_data, builder.add(args[4], offset))
                b_vector = builder.load(b_row, align=4)
                for r, total in enumerate(sums):
                    a_index = builder.add(row(args[1], args[2], r), loop.index)
                    a_lanes = _broadcast(
                        builder, builder.load(builder.gep(a_data, [a_index])), width
                    )
                    builder.store(
                        builder.call(fma, [a_lanes, b_vector, builder.load(total)]), total
                    )
            for total, target in zip(sums, targets, strict=True):
                builder.store(builder.load(total), target, align=4)
            return context.get_dummy_value()

        return types.void(*arguments), codegen

    return product


def _broadcast(builder: Any, value: Any, width: int) -> Any:
    undefined = ir.Constant(ir.VectorType(value.type, width), ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(ir.IntType(32), 0))
    everywhere = ir.Constant(ir.VectorType(ir.IntType(32), width), [0] * width)
    return builder.shuffle_vector(first, undefined, everywhere)


_products = tuple(_block_product(rows, PANEL) for rows in range(1, 9))
_product_1, _product_2, _product_3, _product_4 = _products[:4]
_product_5, _product_6, _product_7, _product_8 = _products[4:]


@njit(fastmath=FASTMATH, inline="always")
def _panel_product(rows, a, a_at, a_stride, b, b_at, b_stride, n, out, out_at, out_stride, add):
    if rows == 8:
        _product_8(a, a_at, a_stride, b, b_at, b_stride, n, out, out_at, out_stride, add)
    elif rows == 7:
        _product_7(a, a_at, a_stride, b, b_at, b_stride, n, out, out_at, out_stride, add)
    elif rows == 6:
        _product_6(a, a_at, a_stride, b, b_at, b_stride, n, out, out_at, out_stride, add)
    elif rows == 5:
        _product_5(a, a_at, a_stride, b, b_at, b_stride, n, out, out_at, out_stride, add)
    elif rows == 4:
        _product_4(a, a_at, a_stride, b, b_at, b_stride, n, out, out_at, out_stride, add)
    elif rows == 3:
        _product_3(a, a_at, a_stride, b, b_at, b_stride, n, out, out_at, out_stride, add)
    elif rows == 2:
        _product_2(a, a_at, a_stride, b, b_at, b_stride, n, out, out_at, out_stride, add)
    else:
        _product_1(a, a_at, a_stride, b, b_at, b_stride, n, out, out_at, out_stride, add)


@njit(fastmath=FASTMATH, nogil=True, cache=True)
def product(rows, columns, a, a_at, a_stride, b, b_at, b_stride, n, out, out_at, out_stride, add):
    """out[:rows, :columns] = (itself if add else 0) + a[:rows, :n] @ b[:n, :columns].

    Arrays are fp32 and contiguous; `*_at` is the flat index of element [0, 0], `*_stride` the
    distance between rows; `columns` is a multiple of PANEL. Each element is one chain of fused
    multiply-adds in the order of n.
    """
    r = 0
    while r < rows:
        left = rows - r
        # Even groups: 9 rows are 5 and 4, where 8 and 1 would pass over b for a single row.
        count = -(-left // -(-left // ROWS))
        for c in range(0, columns, PANEL):
            _panel_product(
                count, a, a_at + r * a_stride, a_stride, b, b_at + c, b_stride, n,
                out, out_at + r * out_stride + c, out_stride, add,
            )  # fmt: skip
        r += count
