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


# By the type of `a`: fp32; unsigned 8-bit by signed 8-bit; 16-bit by 8-bit integers, for CPUs
# whose products of 8 bits saturate; bf16, as the bits of its numbers.
_ARITHMETIC = {
    types.float32: _Arithmetic("fp32", 1, _FLOAT, _FLOAT, _fp32),
    types.uint8: _Arithmetic("int8", 4, _INT32, _INT32, _int8),
    types.int16: _Arithmetic("int16", 2, _INT16, _INT32, _int16),
    types.uint16: _Arithmetic("bf16", 2, _INT32, _FLOAT, _bf16),
}


def _kernel(module: ir.Module, arithmetic: _Arithmetic, rows: int) -> ir.Function:
    """Returns out[:rows, :PANEL] (+)= a[:rows, :n] @ b[:n, :PANEL] with its sums in registers.

    n and strides count groups. A function of its own that is never inlined: its callers would take
    seconds to compile.
    """
    name = f"redmux_{arithmetic.name}_{rows}x{PANEL}"
    if name in module.globals:
        return module.globals[name]
    word = arithmetic.total if arithmetic.group == 1 else _INT32
    vector = ir.VectorType(arithmetic.total, PANEL)
    lanes = ir.VectorType(arithmetic.lane, PANEL)
    pointers = [x.as_pointer() for x in (word, arithmetic.lane, arithmetic.total)]
    arguments = [pointers[0], _INDEX, pointers[1], _INDEX, _INDEX, pointers[2], *[_INDEX] * 3]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), arguments), name)
    function.linkage = "linkonce_odr"
    function.attributes.add("noinline")
    a, a_stride, b, b_stride, n, out, out_stride, add, ahead = function.args
    builder = ir.IRBuilder(function.append_basic_block())
    bytes_ = _INT8.as_pointer()
    prefetch = _declare(builder, "llvm.prefetch.p0", ir.VoidType(), bytes_, *[_INT32] * 3)
    width = arithmetic.lane.width // 8 if arithmetic.lane is not _FLOAT else 4

    def row(data: Any, stride: Any, r: Any) -> Any:
        return builder.gep(data, [builder.mul(stride, r)])

    sums = [cgutils.alloca_once(builder, vector) for _ in range(rows)]
    targets = [
        builder.bitcast(row(out, out_stride, _INDEX(r)), vector.as_pointer()) for r in range(rows)
    ]
    with builder.if_else(builder.icmp_signed("!=", add, _INDEX(0))) as (then, otherwise):
        with then:
            for total, target in zip(sums, targets, strict=True):
                builder.store(builder.load(target, align=4), total)
        with otherwise:
            for total in sums:
                builder.store(vector([0] * PANEL), total)
    with cgutils.for_range(builder, n) as loop:
        line = row(b, b_stride, loop.index)
        panel = builder.load(builder.bitcast(line, lanes.as_pointer()), align=width)
        coming = builder.bitcast(builder.gep(line, [ahead]), bytes_)
        for start in range(0, PANEL * width, _LINE_BYTES):
            address = builder.gep(coming, [_INDEX(start)])
            builder.call(prefetch, [address, *(_INT32(x) for x in (0, 3, 1))])
        for r, total in enumerate(sums):
            one = builder.load(builder.gep(row(a, a_stride, _INDEX(r)), [loop.index]), align=1)
            everywhere = _broadcast(builder, one)
            builder.store(
                arithmetic.multiply_add(builder, builder.load(total), everywhere, panel), total
            )
    for total, target in zip(sums, targets, strict=True):
        builder.store(builder.load(total), target, align=4)
    builder.ret_void()
    return function


def _broadcast(builder: Any, value: Any) -> Any:
    undefined = ir.Constant(ir.VectorType(value.type, PANEL), ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(_INT32, 0))
    everywhere = ir.Constant(ir.VectorType(_INT32, PANEL), [0] * PANEL)
    return builder.shuffle_vector(first, undefined, everywhere)


@intrinsic
def _panel_product(
    typing, rows, a, a_at, a_stride, b, b_at, b_stride, n, out, out_at, out_stride, add, ahead
):
    """out[:rows, :PANEL] (+)= a[:rows, :n] @ b[:n, :PANEL] for 1 to ROWS rows; see `product`."""
    arithmetic = _ARITHMETIC[a.dtype]

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        ints = {
            i: context.cast(builder, args[i], sig.args[i], types.int64)
            for i in (0, 2, 3, 5, 6, 7, 9, 10, 11, 12)
        }
        pointers = {}
        for i, element in ((1, None), (4, arithmetic.lane), (8, None)):
            data = context.make_array(sig.args[i])(context, builder, args[i]).data
            if element is not None:
                data = builder.bitcast(data, element.as_pointer())
            pointers[i] = builder.gep(data, [ints[i + 1]])
        if arithmetic.group > 1:
            pointers[1] = builder.bitcast(pointers[1], _INT32.as_pointer())
        groups = {i: builder.sdiv(ints[i], _INDEX(arithmetic.group)) for i in (3, 7)}
        arguments = [
            pointers[1], groups[3], pointers[4], ints[6], groups[7], pointers[8],
            ints[10], ints[11], ints[12],
        ]  # fmt: skip
        end = builder.append_basic_block("end")
        choice = builder.switch(ints[0], end)
        for count in range(1, ROWS + 1):
            block = builder.append_basic_block()
            choice.add_case(_INDEX(count), block)
            with builder.goto_block(block):
                builder.call(_kernel(builder.module, arithmetic, count), arguments)
                builder.branch(end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    signature = types.void(
        rows, a, a_at, a_stride, b, b_at, b_stride, n, out, out_at, out_stride, add, ahead
    )
    return signature, codegen


@njit(fastmath=FASTMATH, nogil=True, cache=True)
def product(
    rows, columns, a, a_at, a_stride, b, b_at, b_stride, n, out, out_at, out_stride, add, ahead
):
    """out[:rows, :columns] = (itself if add else 0) + a[:rows, :n] @ b[:n, :columns].

    Arrays are contiguous; `*_at` is the flat index of element [0, 0], `*_stride` the distance
    between rows; `columns` is a multiple of PANEL. `ahead` is the distance from b to what the next
    product will take as b, which is fetched meanwhile; 0 for nothing.

    With a and b of fp32 each element is one chain of fused multiply-adds in the order of n. Other
    types of a stand for other arithmetic, see `_ARITHMETIC`: there n and a_stride are multiples of
    its group, b holds a group of inputs side by side for each column, and b's index, stride and
    `ahead` count such groups. Integers of whole numbers sum exactly.
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
