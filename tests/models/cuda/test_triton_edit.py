"""The Triton kernel equals torch, run by Triton's interpreter on the CPU."""

import pytest
import torch

from redmux_server.engine.bank import SiteColumns
from redmux_server.models.cuda.row_edit import choose_edit, torch_edit

triton_edit = pytest.importorskip("redmux_server.models.cuda.triton_edit").triton_edit
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def make(dim, dtype, table_dtype=None, tokens=7, start=3):
    """(h, table, rows, columns) of a mixed step; the identity is among its rows."""
    generator = torch.Generator().manual_seed(dim)
    columns = SiteColumns(start, dim)
    table = torch.randn(6, columns.stop + 5, generator=generator).to(table_dtype or dtype)
    columns.scale_of(table)[0], columns.bias_of(table)[0] = 1, 0
    rows = torch.tensor([0, 5, 1, 1, 0, 3, 2] * 5, dtype=torch.int32)[:tokens]
    return torch.randn(tokens, dim, generator=generator).to(dtype), table, rows, columns


def by_hand(h, table, rows, columns):
    """scale * h + bias in fp32, one token after the other."""
    out = []
    for token, row in zip(h.float(), rows.tolist(), strict=True):
        vectors = table[row, columns.start : columns.stop].float()
        out.append(vectors[: columns.dim] * token + vectors[columns.dim :])
    return torch.stack(out).to(h.dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("dim", [1, 7, 64, 576, 1000, 1024, 2050])
def test_each_token_is_edited_by_its_row(dim, dtype):
    h, *step = make(dim, dtype)
    want = by_hand(h, *step)
    triton_edit(h, *step)
    torch.testing.assert_close(h, want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_kernel_equals_its_twin_in_torch(dtype):
    h, *step = make(100, dtype, tokens=33)
    twin = h.clone()
    triton_edit(h, *step)
    torch_edit(twin, *step)
    torch.testing.assert_close(h, twin, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_the_identity_row_keeps_every_bit():
    h, table, rows, columns = make(70, torch.bfloat16)
    h[0, :3] = torch.tensor([-0.0, float("inf"), float("nan")])
    before = h.clone()
    triton_edit(h, table, rows, columns)
    for token in (0, 4):
        assert torch.equal(h[token].view(torch.int16), before[token].view(torch.int16))
    assert not torch.equal(h[1], before[1])


def test_rows_apart_in_memory_are_edited_and_nothing_between_them():
    h, *step = make(40, torch.float32)
    wide = torch.full((7, 64), 7.0)
    wide[:, :40] = h
    triton_edit(wide[:, :40], *step)
    torch.testing.assert_close(wide[:, :40], by_hand(h, *step), rtol=1e-6, atol=1e-6)
    assert (wide[:, 40:] == 7).all()


def test_fp32_vectors_edit_an_fp16_output_with_their_full_precision():
    # Not bf16: the interpreter rounds it toward zero, which a GPU does not.
    h, *step = make(64, torch.float16, torch.float32)
    want = by_hand(h, *step)
    triton_edit(h, *step)
    assert torch.equal(h, want)


def test_the_table_and_the_rows_are_not_written():
    h, table, rows, columns = make(64, torch.float32)
    kept = table.clone(), rows.clone()
    triton_edit(h, table, rows, columns)
    assert torch.equal(table, kept[0])
    assert torch.equal(rows, kept[1])


def test_the_twin_edits_each_token_by_its_row():
    h, *step = make(30, torch.float32)
    want = by_hand(h, *step)
    torch_edit(h, *step)
    torch.testing.assert_close(h, want, rtol=1e-6, atol=1e-6)


def test_the_cpu_edits_with_torch_and_says_why():
    assert choose_edit(torch.device("cpu"), torch.float32) == (
        torch_edit,
        "edits: torch (no CUDA device)",
    )
