"""Products in the tile registers of AMX, built as LLVM functions.

A tile holds 16 rows of 64 bytes. Half of a panel of packed weights is one as it lies, 16 groups of
inputs by 16 columns; so are 16 rows of activations, whose width is a multiple of a line. A tile
reads 16 rows even where fewer are left (`aligned.rows`), and nobody looks at the results of those.
Each output is one chain of tile products in the order of the inputs, whatever rows are beside it.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from redmux_server.models.cpu import aligned
from redmux_server.models.cpu.arithmetic import (
    FLOAT,
    INDEX,
    INT8,
    INT32,
    PANEL,
    declare,
    define,
    splat,
)
from redmux_server.models.cpu.vector import element, integers

TILE_ROWS = 16
_LINE = aligned.LINE
_STEP_BYTES = 2 * TILE_ROWS * _LINE  # of a panel's weights in one step: two tiles side by side
_BYTES = INT8.as_pointer()
_VOID = ir.VoidType()
_REALS, _WHOLE = ir.VectorType(FLOAT, TILE_ROWS), ir.VectorType(INT32, TILE_ROWS)
# Of the eight tiles: sums [2][2], two of activations, two of weights.
_SUMS, _ROWS, _WEIGHTS = ((0, 1), (2, 3)), (4, 5), (6, 7)


def configuration() -> aligned.Array:
    """Returns what `configure` loads: eight tiles of 16 rows of 64 bytes."""
    setting = aligned.zeros(_LINE, np.uint8)
    setting[0] = 1  # the palette
    setting[16:32:2] = _LINE  # bytes of a row
    setting[48:56] = TILE_ROWS
    return setting


def _call(builder: Any, name: str, *arguments: Any) -> None:
    kinds = [argument.type for argument in arguments]
    builder.call(declare(builder, f"llvm.x86.{name}", _VOID, *kinds), arguments)


def _load(builder: Any, tile: int, address: Any, stride: Any) -> None:
    _call(builder, "tileloadd64", INT8(tile), address, stride)


def _store(builder: Any, tile: int, address: Any, stride: Any) -> None:
    _call(builder, "tilestored64", INT8(tile), address, stride)


def _fetch(builder: Any, address: Any, ahead: Any, apart: int) -> None:
    """Fetches lines of the step that lies `ahead` bytes ahead, if that is not 0."""
    prefetch = declare(builder, "llvm.prefetch.p0", _VOID, _BYTES, *[INT32] * 3)
    coming = builder.gep(address, [ahead])
    with builder.if_then(builder.icmp_signed("!=", ahead, INDEX(0))):
        for start in range(0, _STEP_BYTES, apart):
            arguments = [builder.gep(coming, [INDEX(start)]), *(INT32(x) for x in (0, 3, 1))]
            builder.call(prefetch, arguments)


def _bf16_kernel(module: ir.Module, count: int) -> ir.Function:
    """Returns out[: 16 * count, :PANEL] = a @ b for `count` tiles of rows, one or two.

    a_stride and `ahead` are in bytes; `n` counts steps of 32 inputs.
    """
    arguments = [_BYTES, INDEX, _BYTES, INDEX, _BYTES, INDEX]
    function, builder = define(module, f"redmux_tiles_bf16_{count}", arguments)
    if builder is None:
        return function
    a, a_stride, b, n, out, ahead = function.args
    halves = [(row, half) for row in range(count) for half in (0, 1)]
    for row, half in halves:
        _call(builder, "tilezero", INT8(_SUMS[row][half]))
    with cgutils.for_range(builder, n) as loop:
        weights = builder.gep(b, [builder.mul(loop.index, INDEX(_STEP_BYTES))])
        for half, tile in enumerate(_WEIGHTS):
            _load(builder, tile, builder.gep(weights, [INDEX(half * _LINE)]), INDEX(2 * _LINE))
        _fetch(builder, weights, ahead, _LINE)
        for row in range(count):
            at = builder.mul(a_stride, INDEX(row * TILE_ROWS))
            inputs = builder.gep(a, [builder.add(at, builder.mul(loop.index, INDEX(_LINE)))])
            _load(builder, _ROWS[row], inputs, a_stride)
        for row, half in halves:
            tiles = (_SUMS[row][half], _ROWS[row], _WEIGHTS[half])
            _call(builder, "tdpbf16ps", *(INT8(tile) for tile in tiles))
    for row, half in halves:
        target = builder.gep(out, [INDEX(row * TILE_ROWS * PANEL * 4 + half * _LINE)])
        _store(builder, _SUMS[row][half], target, INDEX(PANEL * 4))
    builder.ret_void()
    return function


def _int8_kernel(module: ir.Module) -> ir.Function:
    """Returns out[:16, :PANEL] = sums over parts of 64 inputs of steps * (first + a @ b), in fp32.

    The very operations of `arithmetic.step_kernel`. a_stride, steps_stride and `ahead` are in
    bytes; `n` counts parts.
    """
    arguments = [_BYTES, INDEX, _BYTES, INDEX, _BYTES, _BYTES, INDEX, _BYTES, INDEX]
    function, builder = define(module, "redmux_tiles_int8", arguments)
    if builder is None:
        return function
    a, a_stride, b, n, first, steps, steps_stride, out, ahead = function.args
    room = cgutils.alloca_once(builder, ir.ArrayType(INT8, 2 * TILE_ROWS * _LINE))
    room.align = _LINE
    fma = declare(builder, "llvm.fma.v16f32", *[_REALS] * 4)

    def at(base: Any, index: Any, stride: int, offset: int = 0) -> Any:
        return builder.gep(base, [builder.add(builder.mul(index, INDEX(stride)), INDEX(offset))])

    def sums_of(part: Any) -> Any:
        start = builder.bitcast(room, _BYTES)
        return at(start, builder.and_(part, INDEX(1)), TILE_ROWS * _LINE)

    def vector(kind: ir.Type, address: Any, align: int) -> Any:
        return builder.load(builder.bitcast(address, kind.as_pointer()), align=align)

    for half in (0, _LINE):
        totals = [cgutils.alloca_once(builder, _REALS) for _ in range(TILE_ROWS)]

        def multiply(part: Any, half: int = half) -> None:
            weights = at(b, part, _STEP_BYTES, half)
            _load(builder, _ROWS[0], at(a, part, _LINE), a_stride)
            _load(builder, _WEIGHTS[0], weights, INDEX(2 * _LINE))
            _call(builder, "tilezero", INT8(0))
            _call(builder, "tdpbusd", *(INT8(x) for x in (0, _ROWS[0], _WEIGHTS[0])))
            _store(builder, 0, sums_of(part), INDEX(_LINE))
            _fetch(builder, weights, ahead, 2 * _LINE)

        def add(part: Any, half: int = half, totals: list[Any] = totals) -> None:
            start, sums = vector(_WHOLE, at(first, part, 2 * _LINE, half), 4), sums_of(part)
            for row, total in enumerate(totals):
                whole = vector(_WHOLE, builder.gep(sums, [INDEX(row * _LINE)]), _LINE)
                value = builder.sitofp(builder.add(whole, start), _REALS)
                place = builder.mul(steps_stride, INDEX(row))
                step = builder.gep(steps, [builder.add(place, builder.mul(part, INDEX(4)))])
                width = splat(builder, vector(FLOAT, step, 4), TILE_ROWS)
                builder.store(builder.call(fma, [value, width, builder.load(total)]), total)

        for total in totals:
            builder.store(_REALS([0] * TILE_ROWS), total)
        # A part's sums are read while the next part is multiplied: vectors cannot be loaded from
        # what a tile has stored before that has reached the cache.
        multiply(INDEX(0))
        with cgutils.for_range(builder, builder.sub(n, INDEX(1))) as loop:
            multiply(builder.add(loop.index, INDEX(1)))
            add(loop.index)
        add(builder.sub(n, INDEX(1)))
        for row, total in enumerate(totals):
            target = builder.gep(out, [INDEX(row * PANEL * 4 + half)])
            builder.store(
                builder.load(total), builder.bitcast(target, _REALS.as_pointer()), align=4
            )
    builder.ret_void()
    return function


def _bytes(context: Any, builder: Any, sig: Any, args: Any, i: int, at: Any) -> Any:
    """Returns the address of the element with index `at` of the array in argument i."""
    size = INDEX(sig.args[i].dtype.bitwidth // 8)
    return element(context, builder, sig, args, i, INT8, builder.mul(at, size))


def _scaled(builder: Any, sig: Any, i: int, count: Any) -> Any:
    """Returns the bytes of `count` elements of the array in argument i."""
    return builder.mul(count, INDEX(sig.args[i].dtype.bitwidth // 8))


@intrinsic
def bf16_tiles(typing, count, a, a_at, a_stride, b, b_at, n, out, out_at, ahead):
    """out[: 16 * count, :PANEL] = a @ b for one or two tiles of rows of bf16, as its bits.

    Indices, `a_stride` and `ahead`, see `vector.product`, count elements of their arrays; n is the
    width of a, a multiple of 32. out is [rows, PANEL] of fp32.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        tiles, *ints = integers(context, builder, sig, args, 0, 2, 3, 5, 6, 8, 9)
        x = _bytes(context, builder, sig, args, 1, ints[0])
        panel = _bytes(context, builder, sig, args, 4, ints[2])
        sums = _bytes(context, builder, sig, args, 7, ints[4])
        stride, far = _scaled(builder, sig, 1, ints[1]), _scaled(builder, sig, 4, ints[5])
        arguments = [x, stride, panel, builder.sdiv(ints[3], INDEX(_LINE // 2)), sums, far]
        with builder.if_else(builder.icmp_signed("==", tiles, INDEX(1))) as (one, two):
            with one:
                builder.call(_bf16_kernel(builder.module, 1), arguments)
            with two:
                builder.call(_bf16_kernel(builder.module, 2), arguments)
        return context.get_dummy_value()

    return types.void(count, a, a_at, a_stride, b, b_at, n, out, out_at, ahead), codegen


@intrinsic
def int8_tile(
    typing, a, a_at, a_stride, b, b_at, n, first, first_at, steps, steps_at, steps_stride, out,
    out_at, ahead,
):  # fmt: skip
    """Does what `vector.step_product` does in parts of 64, with the same bits, for 16 rows.

    n is the width of a, a multiple of 64; all else counts elements of its array.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        ints = integers(context, builder, sig, args, 1, 2, 4, 5, 7, 9, 10, 12, 13)
        x = _bytes(context, builder, sig, args, 0, ints[0])
        panel = _bytes(context, builder, sig, args, 3, ints[2])
        begin = _bytes(context, builder, sig, args, 6, ints[4])
        widths = _bytes(context, builder, sig, args, 8, ints[5])
        sums = _bytes(context, builder, sig, args, 11, ints[7])
        parts = builder.sdiv(ints[3], INDEX(_LINE))
        apart, far = _scaled(builder, sig, 8, ints[6]), _scaled(builder, sig, 3, ints[8])
        arguments = [x, ints[1], panel, parts, begin, widths, apart, sums, far]
        builder.call(_int8_kernel(builder.module), arguments)
        return context.get_dummy_value()

    signature = types.void(
        a, a_at, a_stride, b, b_at, n, first, first_at, steps, steps_at, steps_stride, out,
        out_at, ahead,
    )  # fmt: skip
    return signature, codegen


@intrinsic
def _load_configuration(typing, setting):
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        _call(builder, "ldtilecfg", element(context, builder, sig, args, 0, INT8, INDEX(0)))
        return context.get_dummy_value()

    return types.void(setting), codegen


@intrinsic
def _release(typing):
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        _call(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), codegen


def configure(setting):
    """Readies the calling thread's tiles; `setting` is `configuration`, or None for no tiles."""
    raise NotImplementedError("this is for compiled code")


@overload(configure)
def _configure(setting):
    if isinstance(setting, types.Array):
        return lambda setting: _load_configuration(setting)
    return lambda setting: None


def release(setting):
    """Frees the calling thread's tiles, which its switches from the core have to save."""
    raise NotImplementedError("this is for compiled code")


@overload(release)
def _release_some(setting):
    if isinstance(setting, types.Array):
        return lambda setting: _release()
    return lambda setting: None
