"""Products of few rows with large weights, with what a layer does before and after them inside.

A decode step reads every weight once for a handful of rows, so it takes the time of reading them
and whatever happens while nothing is read: launches, tails, small kernels. Here a layer is four
products and has no kernel of its own for norms, sums, gates and their edits:

- What adds to the residual x also stores h = x * w, w being the weights of the norm that follows,
  and of each row the sum of squares of its own columns. The next product multiplies h and divides
  its fp32 sums by the root of the mean square. So no program reads a whole row of x before it can
  start, and the norm costs the loop nothing.
- h is rounded to the model's dtype before the size of its row is known. In bf16 and fp32 that is
  as exact as rounding afterwards. In fp16 it could overflow, so there h is kept in 32nds: it is
  finite as long as |w| is at most 32, and as exact as in bf16 for rows of x * w whose root mean
  square is above 5e-4.
- A program has columns of its own and all of the inputs, so sums have one order, and those of a
  row do not depend on its neighbours. Up to 32 rows their number changes nothing either; for more
  Hopper has other matrix instructions.

With EARLY a kernel is launched while the one before it still runs, see `triton_early`, and until
that has ended reads only weights, the bank's table and the rows' numbers. It lets the next one be
launched behind its loop: what that asks the cache for would not stay there any longer.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from redmux_server.models.cuda.triton_early import follow, launch_options, lead
from redmux_server.models.cuda.triton_tiles import Device, columns_of, tiles_of

LARGEST_FP16_NORM = 32.0
_TILES_AHEAD: tl.constexpr = tl.constexpr(4)  # as many as the loop has in flight


@triton.jit
def _tile(lines, inner, is_line, DIM: tl.constexpr, IS_EVEN: tl.constexpr):
    """Inputs `inner` of these lines [lines, inner]; what is outside is 0."""
    inside = is_line[:, None]
    if not IS_EVEN:
        inside = inside & (inner < DIM)[None, :]
    return tl.load(lines[:, None] + inner[None, :], mask=inside, other=0)


@triton.jit
def _two_sums(
    h, weight, row, is_row, column, WIDTH: tl.constexpr, DIM: tl.constexpr, GATES: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Two sums [ROWS, COLUMNS] in fp32: over both halves of the inputs, or of gate and up.

    Two, because each is a chain of products that wait for one another: side by side they keep up
    with the memory.
    """
    # The same for every INNER, of which it is a multiple, so that it changes no sum.
    half: tl.constexpr = DIM if GATES else (DIM + 255) // 256 * 128
    apart: tl.constexpr = 0 if GATES else half
    IS_EVEN: tl.constexpr = DIM % INNER == 0 if GATES else 2 * half == DIM
    k = tl.arange(0, INNER)
    is_column = column < WIDTH
    lines = h + row * DIM
    weights = weight + column.to(tl.int64) * DIM
    others = weights
    if GATES:
        others = weights + WIDTH * DIM
    first = tl.zeros([ROWS, COLUMNS], tl.float32)
    second = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, half, INNER):
        values = _tile(lines, start + k, is_row, DIM, IS_EVEN)
        w = _tile(weights, start + k, is_column, DIM, IS_EVEN)
        first = tl.dot(values, tl.trans(w), first, input_precision="ieee")
        if not GATES:
            values = _tile(lines, start + apart + k, is_row, DIM, IS_EVEN)
        w = _tile(others, start + apart + k, is_column, DIM, IS_EVEN)
        second = tl.dot(values, tl.trans(w), second, input_precision="ieee")
    return first, second


@triton.jit
def _fetch_ahead(
    weight, column, WIDTH: tl.constexpr, DIM: tl.constexpr, APART: tl.constexpr,
    INNER: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Asks the L2 cache for the first inputs of both sums, a line of 128 bytes at a time."""
    if EARLY:
        LINE: tl.constexpr = 1024 // weight.dtype.element_ty.primitive_bitwidth
        inner = tl.minimum(tl.arange(0, _TILES_AHEAD * INNER // LINE) * LINE, DIM // 2)
        line = weight + tl.minimum(column, WIDTH - 1).to(tl.int64) * DIM
        for first in tl.static_range(2):
            place = (line[:, None] + (inner[None, :] + first * APART)).to(tl.int64)
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1];\nmov.u32 $0, 0;", "=r,l", [place], tl.int32, False, 1
            )


@triton.jit
def _squares(squares, row, is_row, PARTS: tl.constexpr, PADDED_PARTS: tl.constexpr):
    part = tl.arange(0, PADDED_PARTS)
    inside = is_row[:, None] & (part < PARTS)[None, :]
    return tl.load(squares + row[:, None] * PARTS + part[None, :], mask=inside, other=0)


@triton.jit
def _norm_scale(squares, eps, DIM: tl.constexpr, UNIT: tl.constexpr):
    """What products of h are multiplied by, [rows, 1]: 1 / (the row's root mean square * UNIT)."""
    return (tl.rsqrt(tl.sum(squares, 1) / DIM + eps) / UNIT)[:, None]


@triton.jit
def _biased(y, bias, column, WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        y += tl.load(bias + column, mask=column < WIDTH, other=0).to(tl.float32)[None, :]
    return y


@triton.jit
def _vectors(
    table, rows, start, table_stride, row, is_row, column, WIDTH: tl.constexpr,
    EDITS: tl.constexpr,
):  # fmt: skip
    """Scale and bias [rows, columns] of a site; of the identity, row 0, nothing is read."""
    scale = 1.0
    bias = 0.0
    if EDITS:
        owner = tl.load(rows + row, mask=is_row, other=0).to(tl.int64)
        inside = (owner != 0)[:, None] & (column < WIDTH)[None, :]
        place = table + owner[:, None] * table_stride + start + column[None, :]
        scale = tl.load(place, mask=inside, other=1).to(tl.float32)
        bias = tl.load(place + WIDTH, mask=inside, other=0).to(tl.float32)
    return scale, bias


# In all of these, what is needed at the end is loaded at the start and first looked at behind the
# loop, so that its latency passes while weights are read.
@triton.jit(do_not_specialize=["num_rows"])
def _project_kernel(
    h, squares, weight, bias, out, num_rows, eps,
    WIDTH: tl.constexpr, DIM: tl.constexpr, PARTS: tl.constexpr, PADDED_PARTS: tl.constexpr,
    UNIT: tl.constexpr, HAS_BIAS: tl.constexpr, EARLY: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    row, column = tl.arange(0, ROWS), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    is_row = row < num_rows
    _fetch_ahead(weight, column, WIDTH, DIM, DIM // 2, INNER, EARLY)
    follow(EARLY)
    parts = _squares(squares, row, is_row, PARTS, PADDED_PARTS)
    first, second = _two_sums(
        h, weight, row, is_row, column, WIDTH, DIM, False, ROWS, COLUMNS, INNER
    )
    lead(EARLY)
    y = (first + second) * _norm_scale(parts, eps, DIM, UNIT)
    y = _biased(y, bias, column, WIDTH, HAS_BIAS)
    inside = is_row[:, None] & (column < WIDTH)[None, :]
    place = out + row[:, None] * WIDTH + column[None, :]
    tl.store(place, y.to(out.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=["num_rows", "gate_start", "up_start", "table_stride"],
    do_not_specialize_on_alignment=["rows"],
)
def _gate_kernel(
    h, squares, weight, bias, out, table, rows, gate_start, up_start, table_stride, num_rows, eps,
    WIDTH: tl.constexpr, DIM: tl.constexpr, PARTS: tl.constexpr, PADDED_PARTS: tl.constexpr,
    UNIT: tl.constexpr, HAS_BIAS: tl.constexpr, EARLY: tl.constexpr,
    EDITS_GATE: tl.constexpr, EDITS_UP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    row, column = tl.arange(0, ROWS), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    is_row = row < num_rows
    _fetch_ahead(weight, column, WIDTH, DIM, WIDTH * DIM, INNER, EARLY)
    follow(EARLY)
    parts = _squares(squares, row, is_row, PARTS, PADDED_PARTS)
    gate, up = _two_sums(h, weight, row, is_row, column, WIDTH, DIM, True, ROWS, COLUMNS, INNER)
    lead(EARLY)
    scale = _norm_scale(parts, eps, DIM, UNIT)
    gate = _biased(gate * scale, bias, column, WIDTH, HAS_BIAS)
    up = _biased(up * scale, bias + WIDTH, column, WIDTH, HAS_BIAS)
    s, b = _vectors(table, rows, gate_start, table_stride, row, is_row, column, WIDTH, EDITS_GATE)
    gate = gate * s + b
    s, b = _vectors(table, rows, up_start, table_stride, row, is_row, column, WIDTH, EDITS_UP)
    y = gate * tl.sigmoid(gate) * (up * s + b)
    inside = is_row[:, None] & (column < WIDTH)[None, :]
    place = out + row[:, None] * WIDTH + column[None, :]
    tl.store(place, y.to(out.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=["num_rows", "start", "table_stride"],
    do_not_specialize_on_alignment=["rows"],
)
def _add_kernel(
    inputs, weight, bias, x, h, squares, norm, table, rows, start, table_stride, num_rows,
    WIDTH: tl.constexpr, DIM: tl.constexpr, UNIT: tl.constexpr, HAS_BIAS: tl.constexpr,
    EARLY: tl.constexpr, EDITS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Only this program reads and writes its columns of x, and none reads h or squares."""
    row, column = tl.arange(0, ROWS), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    is_row = row < num_rows
    inside = is_row[:, None] & (column < WIDTH)[None, :]
    place = row[:, None] * WIDTH + column[None, :]
    _fetch_ahead(weight, column, WIDTH, DIM, DIM // 2, INNER, EARLY)
    s, b = _vectors(table, rows, start, table_stride, row, is_row, column, WIDTH, EDITS)
    w = tl.load(norm + column, mask=column < WIDTH, other=0)
    follow(EARLY)
    before = tl.load(x + place, mask=inside, other=0)
    first, second = _two_sums(
        inputs, weight, row, is_row, column, WIDTH, DIM, False, ROWS, COLUMNS, INNER
    )
    lead(EARLY)
    y = _biased(first + second, bias, column, WIDTH, HAS_BIAS) * s + b
    after = (before.to(tl.float32) + y).to(x.dtype.element_ty)
    tl.store(x + place, after, mask=inside)
    after = tl.where(inside, after.to(tl.float32), 0.0)
    scaled = after * (w.to(tl.float32) * UNIT)[None, :]
    tl.store(h + place, scaled.to(h.dtype.element_ty), mask=inside)
    part = tl.program_id(0) + row * tl.num_programs(0)
    tl.store(squares + part, tl.sum(after * after, 1), mask=is_row)


@triton.jit
def _start_kernel(
    ids, embedding, x, h, squares, norm, WIDTH: tl.constexpr, PARTS: tl.constexpr,
    PADDED_PARTS: tl.constexpr, UNIT: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One row of the residual: an embedding, and of it what `_add_kernel` gives out."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PADDED_PARTS)
    column = part[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = column < WIDTH
    line = embedding + tl.load(ids + row) * WIDTH
    value = tl.load(line + column, mask=inside, other=0)
    tl.store(x + row * WIDTH + column, value, mask=inside)
    value = value.to(tl.float32)
    w = tl.load(norm + column, mask=inside, other=0).to(tl.float32) * UNIT
    tl.store(h + row * WIDTH + column, (value * w).to(h.dtype.element_ty), mask=inside)
    tl.store(squares + row * PARTS + part, tl.sum(value * value, 1), mask=part < PARTS)


@dataclass(frozen=True, slots=True, eq=False)
class Residual:
    """The residual of a step's rows, and what the product behind the next norm reads of it."""

    x: Tensor  # [rows, hidden]
    h: Tensor  # [rows, hidden], x times the weights of the next norm, in units for fp16
    squares: Tensor  # [rows, parts] fp32, sums of x's squares


class FewRowProducts:
    """The products of a Llama-like layer for 1 to `most_rows` rows.

    Weights are [width, dim], contiguous, in the dtype of the rows; biases [width] or None. `table`
    is the bank's [bank rows, width], `rows` int32 [rows] says whose vectors a row is edited with,
    and a site's `start` is its first column there, -1 where nobody edits.
    """

    def __init__(
        self, hidden: int, eps: float, dtype: torch.dtype, device: Device, *, early: bool = False
    ) -> None:
        """`hidden` is the width of the residual, `eps` that of its norms.

        With `early` every product is launched while the kernel before it still runs; the device
        must be able to.
        """
        self.most_rows = 32 if dtype.itemsize > 2 else 64  # 64 of fp32 would spill registers
        self._eps = eps
        self._device = device
        self._columns = columns_of(hidden, device)
        parts = triton.cdiv(hidden, self._columns)
        self._norm = {
            "PARTS": parts, "PADDED_PARTS": triton.next_power_of_2(parts),
            "UNIT": 1 / 32 if dtype == torch.float16 else 1.0,
        }  # fmt: skip
        self.early = early
        self._launch = launch_options(early)

    def start(self, ids: Tensor, embedding: Tensor, norm: Tensor) -> Residual:
        """Returns the residual of these tokens, int64 [rows], before a norm of weights `norm`."""
        num_rows, hidden = len(ids), embedding.shape[1]
        x, h = embedding.new_empty((2, num_rows, hidden))
        squares = x.new_empty((num_rows, self._norm["PARTS"]), dtype=torch.float32)
        _start_kernel[(num_rows,)](
            ids, embedding, x, h, squares, norm,
            WIDTH=hidden, COLUMNS=self._columns, **self._norm,
        )  # fmt: skip
        return Residual(x, h, squares)

    def project(self, residual: Residual, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Returns norm(x) @ weight.T + bias [rows, width]."""
        num_rows, (width, dim) = len(residual.x), weight.shape
        out = weight.new_empty((num_rows, width))
        tiles = tiles_of(width, num_rows, weight.itemsize, self._device, gates=False)
        _project_kernel[(triton.cdiv(width, tiles.columns),)](
            residual.h, residual.squares, weight, weight if bias is None else bias, out,
            num_rows, self._eps, WIDTH=width, DIM=dim, HAS_BIAS=bias is not None,
            **self._norm, **self._launch, **tiles.options(),
        )  # fmt: skip
        return out

    def gate(
        self, residual: Residual, weight: Tensor, bias: Tensor | None, table: Tensor,
        rows: Tensor, gate_start: int, up_start: int,
    ) -> Tensor:  # fmt: skip
        """Returns silu(gate) * up [rows, width] of norm(x); `weight` is gate's, then up's."""
        num_rows, width, dim = len(residual.x), weight.shape[0] // 2, weight.shape[1]
        out = weight.new_empty((num_rows, width))
        tiles = tiles_of(width, num_rows, weight.itemsize, self._device, gates=True)
        _gate_kernel[(triton.cdiv(width, tiles.columns),)](
            residual.h, residual.squares, weight, weight if bias is None else bias, out,
            table, rows, gate_start, up_start, table.stride(0), num_rows, self._eps,
            WIDTH=width, DIM=dim, HAS_BIAS=bias is not None,
            EDITS_GATE=gate_start >= 0, EDITS_UP=up_start >= 0,
            **self._norm, **self._launch, **tiles.options(),
        )  # fmt: skip
        return out

    def add(
        self, residual: Residual, inputs: Tensor, weight: Tensor, bias: Tensor | None,
        norm: Tensor, table: Tensor, rows: Tensor, start: int,
    ) -> None:  # fmt: skip
        """Adds the edited inputs @ weight.T + bias to x in place; inputs are [rows, dim].

        `norm` are the weights of the norm before the next product.
        """
        num_rows, (width, dim) = len(residual.x), weight.shape
        tiles = tiles_of(width, num_rows, weight.itemsize, self._device, gates=False)
        _add_kernel[(self._norm["PARTS"],)](
            inputs, weight, weight if bias is None else bias, residual.x, residual.h,
            residual.squares, norm, table, rows, start, table.stride(0), num_rows,
            WIDTH=width, DIM=dim, UNIT=self._norm["UNIT"], HAS_BIAS=bias is not None,
            EDITS=start >= 0, **self._launch, **tiles.options(),
        )  # fmt: skip
