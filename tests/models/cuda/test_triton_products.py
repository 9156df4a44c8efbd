"""Products that normalise, edit, gate and add equal the formulas, run by Triton's interpreter."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from redmux_server.engine.bank import SiteColumns

products = pytest.importorskip("redmux_server.models.cuda.triton_products")
from redmux_server.models.cuda.triton_tiles import Device, tiles_of  # noqa: E402

# Of outputs around 1.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
EPS = 1e-5
START = 5  # of the first site in the table
DEVICES = {  # programs of few columns, or of many with few buffers
    "few columns": Device(1000, 232448, False),
    "many columns": Device(1, 100_000, False),
}


@pytest.fixture(autouse=True)
def dots_of_bf16(monkeypatch):
    """The interpreter multiplies the bits of bf16 as whole numbers: widen them, as a GPU does."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    create_dot = builder.create_dot

    def widened(handle):
        if handle.dtype.scalar.name != "bf16":
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), interpreter.tl.float32)

    monkeypatch.setattr(
        type(builder),
        "create_dot",
        lambda self, a, b, d, *more: create_dot(widened(a), widened(b), d, *more),
    )


class Case:
    """Random operands of one product, and its parts by hand in fp64."""

    def __init__(
        self, rows, hidden, width, dtype, *, inner=0, has_bias=False, device="few columns"
    ):
        generator = torch.Generator().manual_seed(rows + hidden + width)

        def randn(*shape, mean=0.0):
            return (mean + torch.randn(shape, generator=generator)).to(dtype)

        self.dtype = dtype
        self.embedding = randn(rows + 3, hidden)
        self.ids = torch.arange(rows) % 7 + torch.arange(rows) // 7  # some more than once
        self.norm, self.next_norm = randn(hidden, mean=1), randn(hidden, mean=1)
        self.weight = randn(width, inner or hidden) / (inner or hidden) ** 0.5
        self.bias = randn(width) if has_bias else None
        self.table = torch.randn(6, 700, generator=generator)
        self.rows = torch.tensor([0, 5, 1, 1, 0, 3, 2] * 10, dtype=torch.int32)[:rows]
        self.few = products.FewRowProducts(hidden, EPS, dtype, DEVICES[device])
        self.x = self.embedding[self.ids].double()

    def residual(self):
        return self.few.start(self.ids, self.embedding, self.norm)

    def normed(self):
        return self.x / (self.x.square().mean(1, keepdim=True) + EPS).sqrt() * self.norm.double()

    def product(self, inputs):
        y = inputs @ self.weight.double().T
        return y if self.bias is None else y + self.bias.double()

    def edited(self, y, start):
        """scale * y + bias, one row after the other."""
        if start < 0:
            return y
        columns, out = SiteColumns(start, y.shape[1]), []
        for row, owner in zip(y, self.rows.tolist(), strict=True):
            vectors = self.table[owner : owner + 1].double()
            scale, bias = columns.scale_of(vectors)[0], columns.bias_of(vectors)[0]
            out.append(row if owner == 0 else scale * row + bias)
        return torch.stack(out)

    def close(self, got, want):
        tolerance = TOLERANCE[self.dtype]
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


SIZES = [(1, 24, 40), (3, 70, 17), (16, 300, 96), (17, 64, 130)]  # rows, hidden, width


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rows", "hidden", "width"), SIZES)
def test_a_projection_is_of_the_normed_rows(rows, hidden, width, device, dtype):
    case = Case(rows, hidden, width, dtype, has_bias=rows % 2 == 1, device=device)
    got = case.few.project(case.residual(), case.weight, case.bias)
    assert got.dtype == dtype
    case.close(got, case.product(case.normed()))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("starts", [(-1, -1), (START, -1), (START, START + 150)])
@pytest.mark.parametrize(("rows", "hidden", "width"), SIZES)
def test_gate_and_up_are_edited_activated_and_multiplied(rows, hidden, width, starts, dtype):
    width = width // 2 * 2
    case = Case(rows, hidden, width, dtype, has_bias=rows % 2 == 0)
    got = case.few.gate(case.residual(), case.weight, case.bias, case.table, case.rows, *starts)
    gate, up = case.product(case.normed()).chunk(2, 1)
    case.close(got, F.silu(case.edited(gate, starts[0])) * case.edited(up, starts[1]))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("start", [-1, START])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rows", "inner", "hidden"), SIZES)
def test_an_edited_product_is_added_and_ready_for_the_next_norm(
    rows, inner, hidden, device, start, dtype
):
    case = Case(rows, hidden, hidden, dtype, inner=inner, has_bias=rows % 2 == 1, device=device)
    residual = case.residual()
    inputs = torch.randn(rows, inner, generator=torch.Generator().manual_seed(1)).to(dtype)
    case.few.add(
        residual, inputs, case.weight, case.bias, case.next_norm, case.table, case.rows, start
    )
    case.close(residual.x, case.x + case.edited(case.product(inputs.double()), start))
    # What follows takes the sum as it was stored, under the next norm.
    case.x, case.norm = residual.x.double(), case.next_norm
    case.weight, case.bias = torch.eye(hidden, dtype=dtype), None
    case.close(case.few.project(residual, case.weight, None), case.normed())


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_row_has_the_same_bits_alone_and_among_others(dtype):
    outs = []
    for rows in (1, 3, 16):
        case = Case(16, 300, 96, dtype)
        case.embedding[1:] *= rows  # neighbours that differ
        case.ids, case.rows = case.ids[:rows], (case.rows % 5 + 1)[:rows]
        residual = case.residual()
        qkv = case.few.project(residual, case.weight, None)
        gated = case.few.gate(residual, case.weight, None, case.table, case.rows, START, START)
        down = case.weight.new_ones(300, 48)
        case.few.add(residual, gated, down, None, case.norm, case.table, case.rows, START)
        outs.append([t[0] for t in (qkv, gated, residual.x, residual.h, residual.squares)])
    for one, *others in zip(*outs, strict=True):
        assert all(torch.equal(one, other) for other in others)


def test_the_identity_keeps_rows_whatever_the_table_holds():
    case = Case(4, 24, 24, torch.float32)
    case.rows[:] = 0
    case.table[:] = float("nan")
    residual = case.residual()
    case.few.add(residual, case.x.float(), case.weight, None, case.norm, case.table, case.rows, 0)
    case.close(residual.x, case.x + case.product(case.x))


@pytest.mark.parametrize("size", [2e-3, 1.0, 2e3])
def test_rows_of_fp16_neither_overflow_nor_vanish_before_their_norm(size):
    case = Case(5, 300, 40, torch.float16)
    case.embedding *= size
    case.norm *= 10
    case.weight /= 10
    case.x = case.embedding[case.ids].double()
    case.close(case.few.project(case.residual(), case.weight, None), case.product(case.normed()))


def test_what_is_not_finite_in_a_row_stays_in_it():
    case = Case(3, 70, 40, torch.float32)
    case.embedding[case.ids[1]] = float("nan")
    got = case.few.project(case.residual(), case.weight, None)
    assert got[[0, 2]].isfinite().all()
    assert not got[1].isfinite().all()


def test_programs_fit_a_device_and_columns_do_not_depend_on_the_rows():
    hopper = Device(132, 232448, True)
    for width, gates in ((6144, False), (4096, False), (14336, True), (2048, False)):
        tiles = [tiles_of(width, n, 2, hopper, gates=gates) for n in (1, 16, 17, 33, 64)]
        assert [t.rows for t in tiles] == [16, 16, 32, 64, 64]
        assert len({t.columns for t in tiles}) == 1
        for t in tiles:
            programs = -(-width // t.columns)
            assert programs >= 0.9 * 132
            lines = 2 * t.columns + (1 if gates else 2) * t.rows
            held = -(-programs // 132) * (t.stages - 1) * lines * t.inner * 2
            assert held <= 232448, "not all programs are resident at once"
