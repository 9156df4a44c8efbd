"""Products of rows by weights that have a step and an origin for every BLOCK inputs, in LLVM.

A weight is origin + step * level with a level of 4 or 8 bits, an input a whole number of 8 bits
times the step of its block. So a block's part of a sum is

    steps_x * step * sum(level * x) + origin * (steps_x * sum(x))

where the first sum is exact in any order, and the second is the same for all outputs and comes with
the row. Blocks are added in their order, whatever rows are beside.

A block of a panel lies in one piece: for each four inputs a line with the levels of all columns,
then the steps, then the origins, both in fp16. In a line of 4-bit levels the first half of the
columns has the low four bits of each byte and the other half the high ones.
"""

from typing import Any

from llvmlite import ir
from numba.core import cgutils

from redmux_server.models.cpu.arithmetic import (
    FLOAT,
    HAS_VNNI,
    INDEX,
    INT8,
    INT32,
    PANEL,
    by_registers,
    declare,
    define,
    dot_bytes,
    fetch,
    splat,
)

BLOCK = 32  # inputs
_GROUP = 4  # inputs that one word of a row holds
_LINES = BLOCK // _GROUP
_HALF = PANEL // 2
_INT16 = ir.IntType(16)
_WORDS, _WHOLE = ir.VectorType(INT32, _HALF), ir.VectorType(INT32, PANEL)
_REALS, _FP16 = ir.VectorType(FLOAT, PANEL), ir.VectorType(ir.HalfType(), PANEL)
_LOW_BITS = _WORDS([0x0F0F0F0F] * _HALF)


def line_bytes(bits: int) -> int:
    """Returns the size of the levels of four inputs of a panel."""
    return PANEL * _GROUP * bits // 8


def block_bytes(bits: int) -> int:
    """Returns the size of a block of a panel."""
    return _LINES * line_bytes(bits) + 4 * PANEL


def _dot_pairs(builder: Any, total: Any, levels: Any, word: Any) -> Any:
    """Adds sums of two products to 16-bit totals, of which a block of 4-bit levels needs 15."""
    shorts, chars = ir.VectorType(_INT16, 16), ir.VectorType(INT8, 32)
    dot = declare(builder, "llvm.x86.avx2.pmadd.ub.sw", shorts, chars, chars)

    def call(total: Any, levels: Any, word: Any) -> Any:
        products = builder.call(dot, [builder.bitcast(x, chars) for x in (levels, word)])
        added = builder.add(builder.bitcast(total, shorts), products)
        return builder.bitcast(added, total.type)

    return by_registers(builder, 8, call, total, levels, word)


def _join_pairs(builder: Any, total: Any) -> Any:
    shorts = ir.VectorType(_INT16, 16)
    dot = declare(builder, "llvm.x86.avx2.pmadd.wd", ir.VectorType(INT32, 8), shorts, shorts)
    ones = shorts([1] * 16)
    return by_registers(
        builder, 8, lambda x: builder.call(dot, [builder.bitcast(x, shorts), ones]), total
    )


def _halves_of_nibbles(builder: Any, line: Any) -> tuple[Any, Any]:
    """Returns the low and the high four bits of the bytes of a vector of words."""
    four = _WORDS([4] * _HALF)
    high = builder.and_(builder.lshr(line, four), _LOW_BITS)
    return builder.and_(line, _LOW_BITS), high


class _Sums:
    """The sums of a block of one row, for each half of the columns."""

    def __init__(self, builder: Any, bits: int) -> None:
        self._builder = builder
        # 8-bit levels would overflow 16 bits: their low and high four bits are summed apart.
        self._num_planes = bits // 4 if not HAS_VNNI else 1
        self._totals = [
            [cgutils.alloca_once(builder, _WORDS) for _ in range(self._num_planes)] for _ in "01"
        ]

    def clear(self) -> None:
        for half in self._totals:
            for total in half:
                self._builder.store(_WORDS([0] * _HALF), total)

    def add(self, levels: tuple[Any, Any], word: Any) -> None:
        builder, dot = self._builder, dot_bytes if HAS_VNNI else _dot_pairs
        for totals, some in zip(self._totals, levels, strict=True):
            planes = [some] if len(totals) == 1 else _halves_of_nibbles(builder, some)
            for total, plane in zip(totals, planes, strict=True):
                builder.store(dot(builder, builder.load(total), plane, word), total)

    def result(self) -> Any:
        builder, halves = self._builder, []
        for totals in self._totals:
            sums = [builder.load(total) for total in totals]
            if not HAS_VNNI:
                sums = [_join_pairs(builder, total) for total in sums]
            if len(sums) == 2:
                shifted = builder.shl(sums[1], _WORDS([4] * _HALF))
                sums = [builder.add(sums[0], shifted)]
            halves += sums
        both = ir.Constant(_WHOLE, list(range(PANEL)))
        return builder.shuffle_vector(*halves, both)


def block_kernel(module: ir.Module, bits: int, rows: int) -> ir.Function:
    """Returns out[:rows, :PANEL] = a @ panel, of fp32, for weights of 4 or 8 bits.

    a_stride counts words of four inputs and n blocks; `steps` [rows, blocks, 2] are the step of the
    inputs and their sum times that.
    """
    words, reals, chars = (x.as_pointer() for x in (INT32, FLOAT, INT8))
    arguments = [words, INDEX, chars, INDEX, reals, INDEX, reals]
    function, builder = define(module, f"redmux_block{bits}_{rows}x{PANEL}", arguments)
    if builder is None:
        return function
    a, a_stride, b, n, steps, steps_stride, out = function.args
    size, line_size = block_bytes(bits), line_bytes(bits)
    ahead = builder.mul(n, INDEX(size))  # the next panel comes from memory meanwhile
    sums = [_Sums(builder, bits) for _ in range(rows)]
    targets = [
        builder.bitcast(builder.gep(out, [INDEX(r * PANEL)]), _REALS.as_pointer())
        for r in range(rows)
    ]
    for target in targets:
        builder.store(_REALS([0] * PANEL), target, align=4)
    fma = declare(builder, f"llvm.fma.v{PANEL}f32", *[_REALS] * 4)

    def vector(kind: Any, address: Any, offset: Any) -> Any:
        at = builder.bitcast(builder.gep(address, [offset]), kind.as_pointer())
        return builder.load(at, align=1)

    def levels_of(line: Any) -> tuple[Any, Any]:
        if bits == 4:
            return _halves_of_nibbles(builder, vector(_WORDS, line, INDEX(0)))
        first, second = INDEX(0), INDEX(line_size // 2)
        return vector(_WORDS, line, first), vector(_WORDS, line, second)

    with cgutils.for_range(builder, n) as block:
        start = builder.gep(b, [builder.mul(block.index, INDEX(size))])
        fetch(builder, builder.gep(start, [ahead]), size)
        first = builder.mul(block.index, INDEX(_LINES))
        for total in sums:
            total.clear()
        with cgutils.for_range(builder, INDEX(_LINES)) as loop:
            levels = levels_of(builder.gep(start, [builder.mul(loop.index, INDEX(line_size))]))
            at = builder.add(first, loop.index)
            for r, total in enumerate(sums):
                place = builder.add(builder.mul(a_stride, INDEX(r)), at)
                word = builder.load(builder.gep(a, [place]), align=4)
                total.add(levels, splat(builder, word, _HALF))
        step, origin = (
            builder.fpext(vector(_FP16, start, INDEX(_LINES * line_size + part)), _REALS)
            for part in (0, 2 * PANEL)
        )
        for r, (total, target) in enumerate(zip(sums, targets, strict=True)):
            place = builder.add(
                builder.mul(steps_stride, INDEX(r)), builder.mul(block.index, INDEX(2))
            )
            width, sum_x = (
                splat(builder, builder.load(builder.gep(steps, [builder.add(place, INDEX(i))])))
                for i in (0, 1)
            )
            value = builder.fmul(builder.sitofp(total.result(), _REALS), step)
            so_far = builder.call(fma, [value, width, builder.load(target, align=4)])
            builder.store(builder.call(fma, [origin, sum_x, so_far]), target, align=4)
    builder.ret_void()
    return function
