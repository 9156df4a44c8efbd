"""Building blocks of the CPU kernels: a small matrix product in vector registers, and exp.

Both compute each output element by one fixed chain of operations, so a result does not depend on
which other rows are computed with it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

_FEATURES = llvmlite.binding.get_host_cpu_features()
_HAS_AVX512 = _FEATURES.get("avx512f", False)
HAS_VNNI = _HAS_AVX512 and _FEATURES.get("avx512vnni", False)
HAS_BF16 = _HAS_AVX512 and _FEATURES.get("avx512bf16", False)
HAS_AVX2 = _FEATURES.get("avx2", False)

LANES = 16  # one AVX-512 register of fp32, or two AVX2 ones
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


_INDEX, _INT32, _INT16, _INT8 = (ir.IntType(bits) for bits in (64, 32, 16, 8))
_FLOAT = ir.FloatType()
_LINE_BYTES = 64


@dataclass(frozen=True)
class _Arithmetic:
    """How inputs meet weights: `group` of them at a time, which one word of `a` holds."""

    name: str
    group: int
    lane: ir.Type  # holds the same group of one column of `b`
    total: ir.Type
    # (builder, totals, word in every lane, lanes) -> totals, each PANEL wide
    multiply_add: Callable[[ir.IRBuilder, Any, Any, Any], Any]


def _declare(builder: Any, name: str, result: ir.Type, *arguments: ir.Type) -> Any:
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), name)


def _by_registers(builder: Any, count: int, call: Callable[..., Any], *vectors: Any) -> Any:
    """Applies `call` to `count` lanes of PANEL-wide vectors at a time, and joins what it gives."""
    parts = []
    for start in range(0, PANEL, count):
        some = ir.Constant(ir.VectorType(_INT32, count), list(range(start, start + count)))
        parts.append(call(*(builder.shuffle_vector(v, v, some) for v in vectors)))
    while len(parts) > 1:
        size = parts[0].type.count
        both = ir.Constant(ir.VectorType(_INT32, 2 * size), list(range(2 * size)))
        pairs = zip(parts[::2], parts[1::2], strict=True)
        parts = [builder.shuffle_vector(left, right, both) for left, right in pairs]
    return parts[0]


def _fp32(builder: Any, totals: Any, word: Any, lanes: Any) -> Any:
    fma = _declare(builder, f"llvm.fma.v{PANEL}f32", *[totals.type] * 4)
    return builder.call(fma, [word, lanes, totals])


def _int8(builder: Any, totals: Any, word: Any, lanes: Any) -> Any:
    register = ir.VectorType(_INT32, 16)
    dot = _declare(builder, "llvm.x86.avx512.vpdpbusd.512", *[register] * 4)
    return _by_registers(builder, 16, lambda *x: builder.call(dot, x), totals, word, lanes)


def _bf16(builder: Any, totals: Any, word: Any, lanes: Any) -> Any:
    sums, pairs = ir.VectorType(_FLOAT, 16), ir.VectorType(_INT32, 16)
    dot = _declare(builder, "llvm.x86.avx512bf16.dpbf16ps.512", sums, sums, pairs, pairs)
    return _by_registers(builder, 16, lambda *x: builder.call(dot, x), totals, word, lanes)


def _int16(builder: Any, totals: Any, word: Any, lanes: Any) -> Any:
    register, wide = ir.VectorType(_INT16, 16), ir.VectorType(_INT16, 2 * PANEL)
    dot = _declare(builder, "llvm.x86.avx2.pmadd.wd", ir.VectorType(_INT32, 8), register, register)
    narrow = builder.bitcast(lanes, ir.VectorType(_INT8, 2 * PANEL))
    widened = builder.bitcast(builder.sext(narrow, wide), totals.type)

    def call(*x: Any) -> Any:
        return builder.call(dot, [builder.bitcast(value, register) for value in x])

    return builder.add(totals, _by_registers(builder, 8, call, word, widened))


# By the type of `a`: fp32; bf16, as the bits of its numbers; unsigned 8-bit by signed 8-bit;
# 16-bit by 8-bit integers, for CPUs whose products of 8 bits saturate.
_FLOATS = {
    types.float32: _Arithmetic("fp32", 1, _FLOAT, _FLOAT, _fp32),
    types.uint16: _Arithmetic("bf16", 2, _INT32, _FLOAT, _bf16),
}
_INTEGERS = {
    types.uint8: _Arithmetic("int8", 4, _INT32, _INT32, _int8),
    types.int16: _Arithmetic("int16", 2, _INT16, _INT32, _int16),
}


def _kernel(module: ir.Module, arithmetic: _Arithmetic, rows: int) -> ir.Function:
    """Returns out[:rows, :PANEL] (+)= a[:rows, :n] @ b[:n, :PANEL] with its sums in registers.

    n and strides count groups. A function of its own that is never inlined: its callers would take
    seconds to compile.
    """
    word = arithmetic.total if arithmetic.group == 1 else _INT32
    pointers = [x.as_pointer() for x in (word, arithmetic.lane, arithmetic.total)]
    arguments = [pointers[0], _INDEX, pointers[1], _INDEX, _INDEX, pointers[2], *[_INDEX] * 3]
    function, builder = _function(module, f"redmux_{arithmetic.name}_{rows}x{PANEL}", arguments)
    if builder is None:
        return function
    a, a_stride, b, b_stride, n, out, out_stride, add, ahead = function.args
    vector = ir.VectorType(arithmetic.total, PANEL)
    sums = [cgutils.alloca_once(builder, vector) for _ in range(rows)]
    targets = _rows(builder, out, out_stride, rows, vector)
    with builder.if_else(builder.icmp_signed("!=", add, _INDEX(0))) as (then, otherwise):
        with then:
            for total, target in zip(sums, targets, strict=True):
                builder.store(builder.load(target, align=4), total)
        with otherwise:
            for total in sums:
                builder.store(vector([0] * PANEL), total)
    _accumulate(builder, arithmetic, sums, a, a_stride, b, b_stride, n, ahead)
    for total, target in zip(sums, targets, strict=True):
        builder.store(builder.load(total), target, align=4)
    builder.ret_void()
    return function


def _step_kernel(module: ir.Module, arithmetic: _Arithmetic, rows: int) -> ir.Function:
    """Returns out[:rows, :PANEL] = sums over parts of steps * (first + a @ b), out in fp32.

    n is the number of groups, `size` that in a part; `first` is [parts, PANEL]; `steps` [rows,
    parts].
    """
    int32, fp32 = _INT32.as_pointer(), _FLOAT.as_pointer()
    lane = arithmetic.lane.as_pointer()
    arguments = [int32, _INDEX, lane, _INDEX, _INDEX, int32, fp32, _INDEX, fp32]
    function, builder = _function(module, f"redmux_{arithmetic.name}_{rows}x{PANEL}", arguments)
    if builder is None:
        return function
    a, a_stride, b, n, size, first, steps, steps_stride, out = function.args
    whole, real = ir.VectorType(_INT32, PANEL), ir.VectorType(_FLOAT, PANEL)
    sums = [cgutils.alloca_once(builder, whole) for _ in range(rows)]
    targets = _rows(builder, out, _INDEX(PANEL), rows, real)
    for target in targets:
        builder.store(real([0] * PANEL), target, align=4)
    fma = _declare(builder, f"llvm.fma.v{PANEL}f32", *[real] * 4)
    parts = builder.sdiv(builder.add(n, builder.sub(size, _INDEX(1))), size)
    with cgutils.for_range(builder, parts) as loop:
        begin = builder.mul(loop.index, size)
        left = builder.sub(n, begin)
        count = builder.select(builder.icmp_signed("<", left, size), left, size)
        start = builder.bitcast(_at(builder, first, _INDEX(PANEL), loop.index), whole.as_pointer())
        for total in sums:
            builder.store(builder.load(start, align=4), total)
        _accumulate(
            builder, arithmetic, sums, builder.gep(a, [begin]), a_stride,
            _at(builder, b, _INDEX(PANEL), begin), _INDEX(PANEL), count, _INDEX(0),
        )  # fmt: skip
        for r, (total, target) in enumerate(zip(sums, targets, strict=True)):
            step = builder.load(
                builder.gep(_at(builder, steps, steps_stride, _INDEX(r)), [loop.index])
            )
            value = builder.sitofp(builder.load(total), real)
            so_far = builder.load(target, align=4)
            added = builder.call(fma, [value, _broadcast(builder, step), so_far])
            builder.store(added, target, align=4)
    builder.ret_void()
    return function


def _function(module: ir.Module, name: str, arguments: list[ir.Type]) -> tuple[Any, Any]:
    """Returns (function, builder in its first block, or None if it is there already)."""
    if name in module.globals:
        return module.globals[name], None
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), arguments), name)
    function.linkage = "linkonce_odr"
    function.attributes.add("noinline")
    return function, ir.IRBuilder(function.append_basic_block())


def _at(builder: Any, data: Any, stride: Any, index: Any) -> Any:
    return builder.gep(data, [builder.mul(stride, index)])


def _rows(builder: Any, data: Any, stride: Any, count: int, vector: ir.VectorType) -> list[Any]:
    pointer = vector.as_pointer()
    return [
        builder.bitcast(_at(builder, data, stride, _INDEX(r)), pointer) for r in range(count)
    ]


def _accumulate(
    builder: Any, arithmetic: _Arithmetic, sums: list[Any], a: Any, a_stride: Any,
    b: Any, b_stride: Any, n: Any, ahead: Any,
) -> None:  # fmt: skip
    """Adds the products of n groups to `sums`, and fetches what lies `ahead` of them."""
    lanes = ir.VectorType(arithmetic.lane, PANEL)
    width = 4 if arithmetic.lane is _FLOAT else arithmetic.lane.width // 8
    pointer = _INT8.as_pointer()
    prefetch = _declare(builder, "llvm.prefetch.p0", ir.VoidType(), pointer, *[_INT32] * 3)
    with cgutils.for_range(builder, n) as loop:
        line = _at(builder, b, b_stride, loop.index)
        panel = builder.load(builder.bitcast(line, lanes.as_pointer()), align=width)
        coming = builder.bitcast(builder.gep(line, [ahead]), pointer)
        for start in range(0, PANEL * width, _LINE_BYTES):
            address = builder.gep(coming, [_INDEX(start)])
            builder.call(prefetch, [address, *(_INT32(x) for x in (0, 3, 1))])
        for r, total in enumerate(sums):
            row = _at(builder, a, a_stride, _INDEX(r))
            word = _broadcast(builder, builder.load(builder.gep(row, [loop.index]), align=1))
            before = builder.load(total)
            builder.store(arithmetic.multiply_add(builder, before, word, panel), total)


def _broadcast(builder: Any, value: Any) -> Any:
    undefined = ir.Constant(ir.VectorType(value.type, PANEL), ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(_INT32, 0))
    everywhere = ir.Constant(ir.VectorType(_INT32, PANEL), [0] * PANEL)
    return builder.shuffle_vector(first, undefined, everywhere)


def _data(context: Any, builder: Any, sig: Any, args: Any, i: int, element: ir.Type, at: Any) -> Any:
    """Returns where element `at`, counted in `element`s, of the array in argument i is."""
    data = context.make_array(sig.args[i])(context, builder, args[i]).data
    return builder.gep(builder.bitcast(data, element.as_pointer()), [at])


def _call_for(builder: Any, count: Any, kernel: Callable[[int], Any], arguments: list[Any]) -> None:
    """Calls kernel(1), kernel(2) ... or kernel(ROWS), whichever `count` says."""
    end = builder.append_basic_block("end")
    choice = builder.switch(count, end)
    for rows in range(1, ROWS + 1):
        block = builder.append_basic_block()
        choice.add_case(_INDEX(rows), block)
        with builder.goto_block(block):
            builder.call(kernel(rows), arguments)
            builder.branch(end)
    builder.position_at_end(end)


def _integers(context: Any, builder: Any, sig: Any, args: Any, *indices: int) -> list[Any]:
    return [context.cast(builder, args[i], sig.args[i], types.int64) for i in indices]


@intrinsic
def _panel_product(
    typing, rows, a, a_at, a_stride, b, b_at, b_stride, n, out, out_at, out_stride, add, ahead
):
    """out[:rows, :PANEL] (+)= a[:rows, :n] @ b[:n, :PANEL] for 1 to ROWS rows; see `product`."""
    arithmetic = _FLOATS[a.dtype]
    word = _FLOAT if arithmetic.group == 1 else _INT32

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        count, *ints = _integers(context, builder, sig, args, 0, 2, 3, 5, 6, 7, 9, 10, 11, 12)
        group = _INDEX(arithmetic.group)
        ints[0], ints[1], ints[4] = (builder.sdiv(ints[i], group) for i in (0, 1, 4))
        x = _data(context, builder, sig, args, 1, word, ints[0])
        panel = _data(context, builder, sig, args, 4, arithmetic.lane, ints[2])
        sums = _data(context, builder, sig, args, 8, _FLOAT, ints[5])
        arguments = [x, ints[1], panel, ints[3], ints[4], sums, ints[6], ints[7], ints[8]]
        _call_for(builder, count, lambda r: _kernel(builder.module, arithmetic, r), arguments)
        return context.get_dummy_value()

    signature = types.void(
        rows, a, a_at, a_stride, b, b_at, b_stride, n, out, out_at, out_stride, add, ahead
    )
    return signature, codegen


@intrinsic
def _panel_step_product(
    typing, rows, a, a_at, a_stride, b, b_at, n, size, first, first_at, steps, steps_at,
    steps_stride, out, out_at,
):  # fmt: skip
    """As `step_product`, for 1 to ROWS rows."""
    arithmetic = _INTEGERS[a.dtype]

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        count, *ints = _integers(
            context, builder, sig, args, 0, 2, 3, 5, 6, 7, 9, 11, 12, 14
        )
        group = _INDEX(arithmetic.group)
        at, stride, n_groups, size_groups = (builder.sdiv(ints[i], group) for i in (0, 1, 3, 4))
        x = _data(context, builder, sig, args, 1, _INT32, at)
        panel = _data(context, builder, sig, args, 4, arithmetic.lane, ints[2])
        begin = _data(context, builder, sig, args, 8, _INT32, ints[5])
        widths = _data(context, builder, sig, args, 10, _FLOAT, ints[6])
        sums = _data(context, builder, sig, args, 13, _FLOAT, ints[8])
        arguments = [x, stride, panel, n_groups, size_groups, begin, widths, ints[7], sums]
        _call_for(builder, count, lambda r: _step_kernel(builder.module, arithmetic, r), arguments)
        return context.get_dummy_value()

    signature = types.void(
        rows, a, a_at, a_stride, b, b_at, n, size, first, first_at, steps, steps_at,
        steps_stride, out, out_at,
    )  # fmt: skip
    return signature, codegen


@intrinsic
def store_panel(typing, rows, sums, scale, bias, column, out, out_at, out_stride):
    """out[:rows, :PANEL] = scale * sums + bias for sums [rows, PANEL], all fp32 and contiguous.

    Scale and bias are taken from index `column` on; `out_at` is the flat index of out's [0, 0].
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        count, first, at, stride = _integers(context, builder, sig, args, 0, 4, 6, 7)
        vector = ir.VectorType(_FLOAT, PANEL)

        def lanes(i: int, index: Any) -> Any:
            address = _data(context, builder, sig, args, i, _FLOAT, index)
            return builder.bitcast(address, vector.as_pointer())

        fma = _declare(builder, f"llvm.fma.v{PANEL}f32", *[vector] * 4)
        factor = builder.load(lanes(2, first), align=4)
        added = builder.load(lanes(3, first), align=4)
        with cgutils.for_range(builder, count) as loop:
            total = builder.load(lanes(1, builder.mul(loop.index, _INDEX(PANEL))), align=4)
            target = lanes(5, builder.add(at, builder.mul(loop.index, stride)))
            builder.store(builder.call(fma, [total, factor, added]), target, align=4)
        return context.get_dummy_value()

    return types.void(rows, sums, scale, bias, column, out, out_at, out_stride), codegen


@njit(fastmath=FASTMATH, nogil=True, cache=True)
def product(
    rows, columns, a, a_at, a_stride, b, b_at, b_stride, n, out, out_at, out_stride, add, ahead
):
    """out[:rows, :columns] = (itself if add else 0) + a[:rows, :n] @ b[:n, :columns].

    Arrays are contiguous; `*_at` is the flat index of element [0, 0], `*_stride` the distance
    between rows; `columns` is a multiple of PANEL. `ahead` is the distance from b to what the next
    product will take as b, which is fetched meanwhile; 0 for nothing.

    With a and b of fp32 each element is one chain of fused multiply-adds in the order of n. With a
    of uint16, the bits of bf16, n and a_stride are even and b holds two inputs side by side for
    each column; b's index, stride and `ahead` count such pairs.
    """
    # Even tiles: 9 rows are 5 and 4, where 8 and 1 would pass over b for a single row.
    num_tiles = (rows + ROWS - 1) // ROWS
    r = 0
    for tile in range(num_tiles):
        count = (rows - r) // (num_tiles - tile)
        for c in range(0, columns, PANEL):
            _panel_product(
                count, a, a_at + r * a_stride, a_stride, b, b_at + c, b_stride, n,
                out, out_at + r * out_stride + c, out_stride, add, ahead,
            )  # fmt: skip
        r += count


@njit(fastmath=FASTMATH, nogil=True, cache=True)
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
