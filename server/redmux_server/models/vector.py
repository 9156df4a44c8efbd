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


@intrinsic
def _fetch_add(typing, counters, index):
    """Returns counters[index] of an int64 array and adds 1 to it, as one step among threads."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        data = context.make_array(sig.args[0])(context, builder, args[0]).data
        address = builder.gep(data, [args[1]])
        return builder.atomic_rmw("add", address, ir.IntType(64)(1), "monotonic")

    return types.int64(counters, types.int64), codegen


_APART = 16  # counters lie on cache lines of their own


@njit(nogil=True, cache=True)
def counters_of(num_threads):
    """Returns the state of `claim` for one pass of this many threads over some items."""
    return np.zeros(num_threads * _APART, np.int64)


@njit(nogil=True, cache=True)
def claim(counters, thread, num_items):
    """Returns an item from 0 to num_items that no thread has got yet, or num_items for none left.

    Each thread walks an equal share, which is read as one stream, and then helps the others: all
    end together even where another process holds one of their cores for a while.
    """
    num_threads = counters.size // _APART
    for k in range(num_threads):
        share = (thread + k) % num_threads
        first, stop = num_items * share // num_threads, num_items * (share + 1) // num_threads
        if first + counters[share * _APART] < stop:
            item = first + _fetch_add(counters, share * _APART)
            if item < stop:
                return item
    return num_items


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


_FLOAT, _INDEX = ir.FloatType(), ir.IntType(64)
_LINE = 16  # fp32 values in a cache line


def _kernel(module: ir.Module, rows: int) -> ir.Function:
    """Returns out[:rows, :PANEL] (+)= a[:rows, :n] @ b[:n, :PANEL] with its sums in registers.

    A function of its own that is never inlined: its callers would take seconds to compile.
    """
    name = f"redmux_product_{rows}x{PANEL}"
    if name in module.globals:
        return module.globals[name]
    pointer, vector = _FLOAT.as_pointer(), ir.VectorType(_FLOAT, PANEL)
    arguments = [pointer, _INDEX, pointer, _INDEX, _INDEX, pointer, _INDEX, _INDEX, _INDEX]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), arguments), name)
    function.linkage = "linkonce_odr"
    function.attributes.add("noinline")
    a, a_stride, b, b_stride, n, out, out_stride, add, ahead = function.args
    fma = cgutils.get_or_insert_function(
        module, ir.FunctionType(vector, [vector] * 3), f"llvm.fma.v{PANEL}f32"
    )
    hints = [ir.IntType(32)] * 3
    prefetch = cgutils.get_or_insert_function(
        module, ir.FunctionType(ir.VoidType(), [pointer, *hints]), "llvm.prefetch.p0"
    )
    builder = ir.IRBuilder(function.append_basic_block())

    def row(data: Any, stride: Any, r: Any) -> Any:
        return builder.gep(data, [builder.mul(stride, r)])

    def as_vector(address: Any) -> Any:
        return builder.bitcast(address, vector.as_pointer())

    sums = [cgutils.alloca_once(builder, vector) for _ in range(rows)]
    targets = [as_vector(row(out, out_stride, _INDEX(r))) for r in range(rows)]
    with builder.if_else(builder.icmp_signed("!=", add, _INDEX(0))) as (then, otherwise):
        with then:
            for total, target in zip(sums, targets, strict=True):
                builder.store(builder.load(target, align=4), total)
        with otherwise:
            for total in sums:
                builder.store(vector([0.0] * PANEL), total)
    with cgutils.for_range(builder, n) as loop:
        panel = builder.load(as_vector(row(b, b_stride, loop.index)), align=4)
        for line in range(0, PANEL, _LINE):
            address = builder.gep(row(b, b_stride, loop.index), [builder.add(ahead, _INDEX(line))])
            builder.call(prefetch, [address, *(ir.IntType(32)(x) for x in (0, 3, 1))])
        for r, total in enumerate(sums):
            one = builder.load(builder.gep(row(a, a_stride, _INDEX(r)), [loop.index]))
            product = builder.call(fma, [_broadcast(builder, one), panel, builder.load(total)])
            builder.store(product, total)
    for total, target in zip(sums, targets, strict=True):
        builder.store(builder.load(total), target, align=4)
    builder.ret_void()
    return function


def _broadcast(builder: Any, value: Any) -> Any:
    undefined = ir.Constant(ir.VectorType(value.type, PANEL), ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(ir.IntType(32), 0))
    everywhere = ir.Constant(ir.VectorType(ir.IntType(32), PANEL), [0] * PANEL)
    return builder.shuffle_vector(first, undefined, everywhere)


def _panel_product_of(rows: int) -> Any:
    @intrinsic
    def panel_product(
        typing, a, a_at, a_stride, b, b_at, b_stride, n, out, out_at, stride, add, ahead
    ):
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            data = {
                i: context.make_array(sig.args[i])(context, builder, args[i]).data
                for i in (0, 3, 7)
            }
            ints = {
                i: context.cast(builder, args[i], sig.args[i], types.int64)
                for i in (1, 2, 4, 5, 6, 8, 9, 10, 11)
            }
            x, panel, sums = (builder.gep(data[i], [ints[i + 1]]) for i in (0, 3, 7))
            builder.call(
                _kernel(builder.module, rows),
                [x, ints[2], panel, ints[5], ints[6], sums, ints[9], ints[10], ints[11]],
            )
            return context.get_dummy_value()

        arguments = (a, a_at, a_stride, b, b_at, b_stride, n, out, out_at, stride, add, ahead)
        return types.void(*arguments), codegen

    return panel_product


_products = tuple(_panel_product_of(rows) for rows in range(1, 9))
_product_1, _product_2, _product_3, _product_4 = _products[:4]
_product_5, _product_6, _product_7, _product_8 = _products[4:]


@njit(fastmath=FASTMATH, inline="always")
def _panel_product(
    rows, a, a_at, a_stride, b, b_at, b_stride, n, out, out_at, out_stride, add, ahead
):
    if rows == 8:
        _product_8(a, a_at, a_stride, b, b_at, b_stride, n, out, out_at, out_stride, add, ahead)
    elif rows == 7:
        _product_7(a, a_at, a_stride, b, b_at, b_stride, n, out, out_at, out_stride, add, ahead)
    elif rows == 6:
        _product_6(a, a_at, a_stride, b, b_at, b_stride, n, out, out_at, out_stride, add, ahead)
    elif rows == 5:
        _product_5(a, a_at, a_stride, b, b_at, b_stride, n, out, out_at, out_stride, add, ahead)
    elif rows == 4:
        _product_4(a, a_at, a_stride, b, b_at, b_stride, n, out, out_at, out_stride, add, ahead)
    elif rows == 3:
        _product_3(a, a_at, a_stride, b, b_at, b_stride, n, out, out_at, out_stride, add, ahead)
    elif rows == 2:
        _product_2(a, a_at, a_stride, b, b_at, b_stride, n, out, out_at, out_stride, add, ahead)
    else:
        _product_1(a, a_at, a_stride, b, b_at, b_stride, n, out, out_at, out_stride, add, ahead)


@njit(fastmath=FASTMATH, nogil=True, cache=True)
def product(
    rows, columns, a, a_at, a_stride, b, b_at, b_stride, n, out, out_at, out_stride, add, ahead
):
    """out[:rows, :columns] = (itself if add else 0) + a[:rows, :n] @ b[:n, :columns].

    Arrays are fp32 and contiguous; `*_at` is the flat index of element [0, 0], `*_stride` the
    distance between rows; `columns` is a multiple of PANEL. Each element is one chain of fused
    multiply-adds in the order of n. `ahead` is the distance from b to what the next product will
    take as b, which is fetched meanwhile; 0 for nothing.
    """
    r = 0
    while r < rows:
        left = rows - r
        # Even groups: 9 rows are 5 and 4, where 8 and 1 would pass over b for a single row.
        count = -(-left // -(-left // ROWS))
        for c in range(0, columns, PANEL):
            _panel_product(
                count, a, a_at + r * a_stride, a_stride, b, b_at + c, b_stride, n,
                out, out_at + r * out_stride + c, out_stride, add, ahead,
            )  # fmt: skip
        r += count
