"""Small matrix products in vector registers, built as LLVM functions for each number of rows.

Each output element is one fixed chain of operations, so a result does not depend on which other
rows are computed with it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import llvmlite.binding
import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils


def _features() -> Mapping[str, bool]:
    """Returns what kernels may use: what NUMBA_CPU_FEATURES grants, else what this CPU has."""
    granted = numba.config.CPU_FEATURES
    if granted is None:
        host: Mapping[str, bool] = llvmlite.binding.get_host_cpu_features()
        return host
    return {name[1:]: name[0] == "+" for name in granted.split(",")}


_FEATURES = _features()
_HAS_AVX512 = _FEATURES.get("avx512f", False)
HAS_VNNI = _HAS_AVX512 and _FEATURES.get("avx512vnni", False)
HAS_BF16 = _HAS_AVX512 and _FEATURES.get("avx512bf16", False)
HAS_TILES = _HAS_AVX512 and all(
    _FEATURES.get(name, False) for name in ("amx-tile", "amx-int8", "amx-bf16")
)
HAS_AVX2 = _FEATURES.get("avx2", False)

# A product works on ROWS x PANEL sums at a time: as many as the registers hold beside operands.
ROWS, PANEL = (8, 32) if _HAS_AVX512 else (6, 16)

INDEX, INT32, _INT16, INT8 = (ir.IntType(bits) for bits in (64, 32, 16, 8))
FLOAT = ir.FloatType()
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


def declare(builder: Any, name: str, result: ir.Type, *arguments: ir.Type) -> Any:
    """Returns the function `name` of the module that is being built, declared if need be."""
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), name)


def by_registers(builder: Any, count: int, call: Callable[..., Any], *vectors: Any) -> Any:
    """Applies `call` to `count` lanes of the vectors at a time, and joins what it gives."""
    parts = []
    for start in range(0, vectors[0].type.count, count):
        some = ir.Constant(ir.VectorType(INT32, count), list(range(start, start + count)))
        parts.append(call(*(builder.shuffle_vector(v, v, some) for v in vectors)))
    while len(parts) > 1:
        size = parts[0].type.count
        both = ir.Constant(ir.VectorType(INT32, 2 * size), list(range(2 * size)))
        pairs = zip(parts[::2], parts[1::2], strict=True)
        parts = [builder.shuffle_vector(left, right, both) for left, right in pairs]
    return parts[0]


def _fp32(builder: Any, totals: Any, word: Any, lanes: Any) -> Any:
    fma = declare(builder, f"llvm.fma.v{PANEL}f32", *[totals.type] * 4)
    return builder.call(fma, [word, lanes, totals])


def _fp32_by_bf16(builder: Any, totals: Any, word: Any, lanes: Any) -> Any:
    high = builder.shl(builder.zext(lanes, ir.VectorType(INT32, PANEL)), splat(builder, INT32(16)))
    return _fp32(builder, totals, word, builder.bitcast(high, totals.type))


def dot_bytes(builder: Any, totals: Any, word: Any, lanes: Any) -> Any:
    """Returns totals plus sums of four products of unsigned bytes of `word` by those of `lanes`."""
    register = ir.VectorType(INT32, 16)
    dot = declare(builder, "llvm.x86.avx512.vpdpbusd.512", *[register] * 4)
    return by_registers(builder, 16, lambda *x: builder.call(dot, x), totals, word, lanes)


def _bf16(builder: Any, totals: Any, word: Any, lanes: Any) -> Any:
    sums, pairs = ir.VectorType(FLOAT, 16), ir.VectorType(INT32, 16)
    dot = declare(builder, "llvm.x86.avx512bf16.dpbf16ps.512", sums, sums, pairs, pairs)
    return by_registers(builder, 16, lambda *x: builder.call(dot, x), totals, word, lanes)


def _int16(builder: Any, totals: Any, word: Any, lanes: Any) -> Any:
    register, wide = ir.VectorType(_INT16, 16), ir.VectorType(_INT16, 2 * PANEL)
    dot = declare(builder, "llvm.x86.avx2.pmadd.wd", ir.VectorType(INT32, 8), register, register)
    narrow = builder.bitcast(lanes, ir.VectorType(INT8, 2 * PANEL))
    widened = builder.bitcast(builder.sext(narrow, wide), totals.type)

    def call(*x: Any) -> Any:
        return builder.call(dot, [builder.bitcast(value, register) for value in x])

    return builder.add(totals, by_registers(builder, 8, call, word, widened))


# By the types of `a` and `b`, where bf16 is the bits of its numbers, and in `b` two of them.
FLOATS = {
    (types.float32, types.float32): _Arithmetic("fp32", 1, FLOAT, FLOAT, _fp32),
    (types.float32, types.uint16): _Arithmetic("fp32_bf16", 1, _INT16, FLOAT, _fp32_by_bf16),
    (types.uint16, types.uint32): _Arithmetic("bf16", 2, INT32, FLOAT, _bf16),
}
# By the type of `a`: unsigned 8-bit by signed 8-bit; 16-bit by 8-bit integers, for CPUs whose
# products of 8 bits saturate.
INTEGERS = {
    types.uint8: _Arithmetic("int8", 4, INT32, INT32, dot_bytes),
    types.int16: _Arithmetic("int16", 2, _INT16, INT32, _int16),
}


def kernel(module: ir.Module, arithmetic: _Arithmetic, rows: int) -> ir.Function:
    """Returns out[:rows, :PANEL] (+)= a[:rows, :n] @ b[:n, :PANEL] with its sums in registers.

    n and strides count groups. A function of its own that is never inlined: its callers would take
    seconds to compile.
    """
    word = arithmetic.total if arithmetic.group == 1 else INT32
    pointers = [x.as_pointer() for x in (word, arithmetic.lane, arithmetic.total)]
    arguments = [pointers[0], INDEX, pointers[1], INDEX, pointers[2], *[INDEX] * 3]
    function, builder = define(module, f"redmux_{arithmetic.name}_{rows}x{PANEL}", arguments)
    if builder is None:
        return function
    a, a_stride, b, n, out, out_stride, add, ahead = function.args
    vector = ir.VectorType(arithmetic.total, PANEL)
    sums = [cgutils.alloca_once(builder, vector) for _ in range(rows)]
    targets = _rows(builder, out, out_stride, rows, vector)
    with builder.if_else(builder.icmp_signed("!=", add, INDEX(0))) as (then, otherwise):
        with then:
            for total, target in zip(sums, targets, strict=True):
                builder.store(builder.load(target, align=4), total)
        with otherwise:
            for total in sums:
                builder.store(vector([0] * PANEL), total)
    _accumulate(builder, arithmetic, sums, a, a_stride, b, n, ahead)
    for total, target in zip(sums, targets, strict=True):
        builder.store(builder.load(total), target, align=4)
    builder.ret_void()
    return function


def step_kernel(module: ir.Module, arithmetic: _Arithmetic, rows: int) -> ir.Function:
    """Returns out[:rows, :PANEL] = sums over parts of steps * (first + a @ b), out in fp32.

    n is the number of groups, `size` that in a part; `first` is [parts, PANEL]; `steps` [rows,
    parts].
    """
    int32, fp32 = INT32.as_pointer(), FLOAT.as_pointer()
    lane = arithmetic.lane.as_pointer()
    arguments = [int32, INDEX, lane, INDEX, INDEX, int32, fp32, INDEX, fp32]
    function, builder = define(module, f"redmux_{arithmetic.name}_{rows}x{PANEL}", arguments)
    if builder is None:
        return function
    a, a_stride, b, n, size, first, steps, steps_stride, out = function.args
    whole, real = ir.VectorType(INT32, PANEL), ir.VectorType(FLOAT, PANEL)
    sums = [cgutils.alloca_once(builder, whole) for _ in range(rows)]
    targets = _rows(builder, out, INDEX(PANEL), rows, real)
    for target in targets:
        builder.store(real([0] * PANEL), target, align=4)
    fma = declare(builder, f"llvm.fma.v{PANEL}f32", *[real] * 4)
    parts = builder.sdiv(builder.add(n, builder.sub(size, INDEX(1))), size)
    ahead = builder.mul(n, INDEX(PANEL))  # the next panel comes from memory meanwhile
    with cgutils.for_range(builder, parts) as loop:
        begin = builder.mul(loop.index, size)
        left = builder.sub(n, begin)
        count = builder.select(builder.icmp_signed("<", left, size), left, size)
        start = builder.bitcast(_at(builder, first, INDEX(PANEL), loop.index), whole.as_pointer())
        for total in sums:
            builder.store(builder.load(start, align=4), total)
        _accumulate(
            builder, arithmetic, sums, builder.gep(a, [begin]), a_stride,
            _at(builder, b, INDEX(PANEL), begin), count, ahead,
        )  # fmt: skip
        for r, (total, target) in enumerate(zip(sums, targets, strict=True)):
            step = builder.load(
                builder.gep(_at(builder, steps, steps_stride, INDEX(r)), [loop.index])
            )
            value = builder.sitofp(builder.load(total), real)
            so_far = builder.load(target, align=4)
            added = builder.call(fma, [value, splat(builder, step), so_far])
            builder.store(added, target, align=4)
    builder.ret_void()
    return function


def define(module: ir.Module, name: str, arguments: list[ir.Type]) -> tuple[Any, Any]:
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
    return [builder.bitcast(_at(builder, data, stride, INDEX(r)), pointer) for r in range(count)]


def _accumulate(
    builder: Any, arithmetic: _Arithmetic, sums: list[Any], a: Any, a_stride: Any,
    b: Any, n: Any, ahead: Any,
) -> None:  # fmt: skip
    """Adds the products of n groups to `sums`, and fetches what lies `ahead` of them."""
    lanes = ir.VectorType(arithmetic.lane, PANEL)
    width = 4 if arithmetic.lane is FLOAT else arithmetic.lane.width // 8
    with cgutils.for_range(builder, n) as loop:
        line = _at(builder, b, INDEX(PANEL), loop.index)
        panel = builder.load(builder.bitcast(line, lanes.as_pointer()), align=width)
        coming = builder.bitcast(builder.gep(line, [ahead]), INT8.as_pointer())
        fetch(builder, coming, PANEL * width)
        for r, total in enumerate(sums):
            row = _at(builder, a, a_stride, INDEX(r))
            word = splat(builder, builder.load(builder.gep(row, [loop.index]), align=1))
            before = builder.load(total)
            builder.store(arithmetic.multiply_add(builder, before, word, panel), total)


def fetch(builder: Any, address: Any, size: int) -> None:
    """Has the memory send `size` bytes from an address on, for later."""
    kinds = [INT8.as_pointer(), *[INT32] * 3]
    prefetch = declare(builder, "llvm.prefetch.p0", ir.VoidType(), *kinds)
    for start in range(0, size, _LINE_BYTES):
        line = builder.gep(address, [INDEX(start)])
        builder.call(prefetch, [line, *(INT32(x) for x in (0, 3, 1))])


def splat(builder: Any, value: Any, count: int = PANEL) -> Any:
    """Returns a vector that has the value in each of `count` lanes."""
    undefined = ir.Constant(ir.VectorType(value.type, count), ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(INT32, 0))
    everywhere = ir.Constant(ir.VectorType(INT32, count), [0] * count)
    return builder.shuffle_vector(first, undefined, everywhere)
