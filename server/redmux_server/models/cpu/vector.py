"""Building blocks of the CPU kernels: products of a few rows by panels of columns, and exp.

Both compute each output element by one fixed chain of operations, so a result does not depend on
which other rows are computed with it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from redmux_server.models.cpu.arithmetic import (
    FLOAT,
    FLOATS,
    INDEX,
    INT8,
    INT32,
    INTEGERS,
    PANEL,
    ROWS,
    declare,
    kernel,
    step_kernel,
)
from redmux_server.models.cpu.block_kernel import BLOCK, block_kernel
from redmux_server.models.cpu.compiled import compiled

Array = np.ndarray[Any, Any]
_LOG2_E = np.float32(1.44269504088896341)
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)


@compiled(forceinline=True)
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


def element(
    context: Any, builder: Any, sig: Any, args: Any, i: int, element: ir.Type, at: Any
) -> Any:
    """Returns where element `at`, counted in `element`s, of the array in argument i is."""
    data = context.make_array(sig.args[i])(context, builder, args[i]).data
    return builder.gep(builder.bitcast(data, element.as_pointer()), [at])


def _call_for(builder: Any, count: Any, make: Callable[[int], Any], arguments: list[Any]) -> None:
    """Calls make(1), make(2) ... or make(ROWS), whichever `count` says."""
    end = builder.append_basic_block("end")
    choice = builder.switch(count, end)
    for rows in range(1, ROWS + 1):
        block = builder.append_basic_block()
        choice.add_case(INDEX(rows), block)
        with builder.goto_block(block):
            builder.call(make(rows), arguments)
            builder.branch(end)
    builder.position_at_end(end)


def integers(context: Any, builder: Any, sig: Any, args: Any, *indices: int) -> list[Any]:
    """Returns the arguments at these indices as 64-bit integers."""
    return [context.cast(builder, args[i], sig.args[i], types.int64) for i in indices]


@intrinsic
def _panel_product(
    typing, rows, a, a_at, a_stride, b, b_at, n, out, out_at, out_stride, add, ahead
):
    """out[:rows, :PANEL] (+)= a[:rows, :n] @ b[:n, :PANEL] for 1 to ROWS rows; see `product`."""
    arithmetic = FLOATS[a.dtype, b.dtype]
    word = FLOAT if arithmetic.group == 1 else INT32

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        count, *ints = integers(context, builder, sig, args, 0, 2, 3, 5, 6, 8, 9, 10, 11)
        group = INDEX(arithmetic.group)
        ints[0], ints[1], ints[3] = (builder.sdiv(ints[i], group) for i in (0, 1, 3))
        x = element(context, builder, sig, args, 1, word, ints[0])
        panel = element(context, builder, sig, args, 4, arithmetic.lane, ints[2])
        sums = element(context, builder, sig, args, 7, FLOAT, ints[4])
        arguments = [x, ints[1], panel, ints[3], sums, ints[5], ints[6], ints[7]]
        _call_for(builder, count, lambda r: kernel(builder.module, arithmetic, r), arguments)
        return context.get_dummy_value()

    return types.void(
        rows, a, a_at, a_stride, b, b_at, n, out, out_at, out_stride, add, ahead
    ), codegen


@intrinsic
def _panel_step_product(
    typing, rows, a, a_at, a_stride, b, b_at, n, size, first, first_at, steps, steps_at,
    steps_stride, out, out_at,
):  # fmt: skip
    """As `step_product`, for 1 to ROWS rows."""
    arithmetic = INTEGERS[a.dtype]

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        count, *ints = integers(context, builder, sig, args, 0, 2, 3, 5, 6, 7, 9, 11, 12, 14)
        group = INDEX(arithmetic.group)
        at, stride, n_groups, size_groups = (builder.sdiv(ints[i], group) for i in (0, 1, 3, 4))
        x = element(context, builder, sig, args, 1, INT32, at)
        panel = element(context, builder, sig, args, 4, arithmetic.lane, ints[2])
        begin = element(context, builder, sig, args, 8, INT32, ints[5])
        widths = element(context, builder, sig, args, 10, FLOAT, ints[6])
        sums = element(context, builder, sig, args, 13, FLOAT, ints[8])
        arguments = [x, stride, panel, n_groups, size_groups, begin, widths, ints[7], sums]
        _call_for(builder, count, lambda r: step_kernel(builder.module, arithmetic, r), arguments)
        return context.get_dummy_value()

    signature = types.void(
        rows, a, a_at, a_stride, b, b_at, n, size, first, first_at, steps, steps_at,
        steps_stride, out, out_at,
    )  # fmt: skip
    return signature, codegen


@intrinsic
def _panel_block_product(
    typing, rows, bits, a, a_at, a_stride, b, b_at, n, steps, steps_at, steps_stride, out, out_at
):
    """As `block_product`, for 1 to ROWS rows."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        count, chosen, *ints = integers(context, builder, sig, args, 0, 1, 3, 4, 6, 7, 9, 10, 12)
        at, stride, blocks = (
            builder.sdiv(ints[i], INDEX(size)) for i, size in ((0, 4), (1, 4), (3, BLOCK))
        )
        x = element(context, builder, sig, args, 2, INT32, at)
        panel = element(context, builder, sig, args, 5, INT8, ints[2])
        widths = element(context, builder, sig, args, 8, FLOAT, ints[4])
        sums = element(context, builder, sig, args, 11, FLOAT, ints[6])
        arguments = [x, stride, panel, blocks, widths, ints[5], sums]
        is_four = builder.icmp_signed("==", chosen, INDEX(4))
        with builder.if_else(is_four) as (four, eight):
            for width, branch in ((4, four), (8, eight)):
                with branch:
                    make = partial(block_kernel, builder.module, width)
                    _call_for(builder, count, make, arguments)
        return context.get_dummy_value()

    signature = types.void(
        rows, bits, a, a_at, a_stride, b, b_at, n, steps, steps_at, steps_stride, out, out_at
    )
    return signature, codegen


@intrinsic
def store_panel(typing, rows, sums, scale, bias, column, out, out_at, out_stride):
    """out[:rows, :PANEL] = scale * sums + bias for sums [rows, PANEL], all fp32 and contiguous.

    Scale and bias are taken from index `column` on; `out_at` is the flat index of out's [0, 0].
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        count, first, at, stride = integers(context, builder, sig, args, 0, 4, 6, 7)
        vector = ir.VectorType(FLOAT, PANEL)

        def lanes(i: int, index: Any) -> Any:
            address = element(context, builder, sig, args, i, FLOAT, index)
            return builder.bitcast(address, vector.as_pointer())

        fma = declare(builder, f"llvm.fma.v{PANEL}f32", *[vector] * 4)
        factor = builder.load(lanes(2, first), align=4)
        added = builder.load(lanes(3, first), align=4)
        with cgutils.for_range(builder, count) as loop:
            total = builder.load(lanes(1, builder.mul(loop.index, INDEX(PANEL))), align=4)
            target = lanes(5, builder.add(at, builder.mul(loop.index, stride)))
            builder.store(builder.call(fma, [total, factor, added]), target, align=4)
        return context.get_dummy_value()

    return types.void(rows, sums, scale, bias, column, out, out_at, out_stride), codegen


# A literal would be a type of its own, for which all that it is handed to is compiled: the begin
# of an array, and whether a product adds to what is there.
START = np.int64(0)
ADD, ANEW = np.int64(1), np.int64(0)


@compiled
def product(
    rows, columns, a, a_at, a_stride, b, b_at, b_apart, n, out, out_at, out_stride, add, ahead
):
    """out[:rows, :columns] = (itself if add else 0) + a[:rows, :n] @ b[:n, :columns].

    Arrays are contiguous; `*_at` is the flat index of element [0, 0], `*_stride` the distance
    between rows. b lies panel by panel, [n, PANEL] each, `b_apart` from the start of one to that of
    the next; `columns` is a multiple of PANEL. `ahead` is the distance from b to what the next
    product will take as b, which is fetched meanwhile; 0 for nothing.

    With a of fp32 each element is one chain of fused multiply-adds in the order of n; b is fp32 or
    uint16, the bits of bf16. With a of uint16, n and a_stride are even and b holds two inputs side
    by side for each column; indices and distances of b count such pairs.
    """
    # Even tiles: 9 rows are 5 and 4, where 8 and 1 would pass over b for a single row.
    num_tiles = (rows + ROWS - 1) // ROWS
    r = 0
    for tile in range(num_tiles):
        count = (rows - r) // (num_tiles - tile)
        for p in range(columns // PANEL):
            _panel_product(
                count, a, a_at + r * a_stride, a_stride, b, b_at + p * b_apart, n,
                out, out_at + r * out_stride + p * PANEL, out_stride, add, ahead,
            )  # fmt: skip
        r += count


@compiled
def step_product(
    rows, a, a_at, a_stride, b, b_at, n, size, first, first_at, steps, steps_at, steps_stride,
    out, out_at,
):  # fmt: skip
    """out[:rows, :PANEL] = sum over p of steps[:rows, p] * (first[p] + a_p @ b_p), in fp32.

    a_p are `size` inputs of a, whole numbers, and b_p their weights of 8 bits; the last part may be
    shorter. uint8 inputs lie by four, int16 ones by two for each column of b, whose index counts
    such groups; n, size and a_stride are multiples. `first` is [parts, PANEL], out [rows, PANEL].
    The sum of a part is exact in any order.
    """
    num_tiles = (rows + ROWS - 1) // ROWS
    r = 0
    for tile in range(num_tiles):
        count = (rows - r) // (num_tiles - tile)
        _panel_step_product(
            count, a, a_at + r * a_stride, a_stride, b, b_at, n, size, first, first_at,
            steps, steps_at + r * steps_stride, steps_stride, out, out_at + r * PANEL,
        )  # fmt: skip
        r += count


@compiled
def block_product(
    rows, bits, a, a_at, a_stride, b, b_at, n, steps, steps_at, steps_stride, out, out_at
):
    """out[:rows, :PANEL] = a[:rows, :n] @ a panel of weights of 4 or 8 bits, see `block_kernel`.

    a is int8, n and a_stride multiples of BLOCK, `b_at` the byte in b where the panel starts.
    """
    num_tiles = (rows + ROWS - 1) // ROWS
    r = 0
    for tile in range(num_tiles):
        count = (rows - r) // (num_tiles - tile)
        _panel_block_product(
            count, bits, a, a_at + r * a_stride, a_stride, b, b_at, n,
            steps, steps_at + r * steps_stride, steps_stride, out, out_at + r * PANEL,
        )  # fmt: skip
        r += count
