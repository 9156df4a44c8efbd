"""Int8Linear: rows that are exact in themselves, whatever else is in the step."""

import pytest
import torch
import torch.nn.functional as F

from redmux.errors import FailedPreconditionError
from redmux_server.models import quantized
from redmux_server.models.accelerate import pack_linears
from redmux_server.models.quantized import (
    MAX_IN_FEATURES,
    Int8Linear,
    can_quantize,
    exact_levels,
    int8_linears,
)

pytestmark = pytest.mark.skipif(not can_quantize(), reason="this build of torch has no FBGEMM")

# (in_features, out_features): odd, wide, tall, and long enough to be split over threads.
SHAPES = [(4, 4), (33, 7), (64, 260), (257, 129), (576, 1536), (1536, 576), (8192, 96)]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


has_fine_levels = can_quantize() and exact_levels() == 127
levels_of_any_cpu = pytest.mark.parametrize("levels", [127, 63] if has_fine_levels else [63])


def make(weight, bias=None, levels=None):
    return Int8Linear(weight, bias, levels or exact_levels())


def by_hand(x, weight, bias, levels):
    """The same rounding in float64, written for one row and one channel at a time."""
    rows = []
    for row in x.double():
        step = row.abs().max() / levels
        rounded = torch.round(row / step) * step
        if levels == 63:
            rounded += torch.round((row - rounded) / step * 126) * step / 126
        channels = []
        for channel in weight.double():
            scale = channel.abs().max() / 127
            channels.append(float(rounded @ (torch.round(channel / scale) * scale)))
        rows.append(torch.tensor(channels, dtype=torch.float64))
    return torch.stack(rows) + (0 if bias is None else bias.double())


@levels_of_any_cpu
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(("size", "out"), [(4, 4), (33, 7), (64, 40), (257, 21)])
def test_it_is_the_product_of_rounded_rows_and_rounded_weights(size, out, has_bias, levels):
    weight, x = randn(out, size), randn(5, size, seed=2)
    bias = randn(out, seed=1) if has_bias else None
    got = make(weight, bias, levels)(x).double()
    torch.testing.assert_close(got, by_hand(x, weight, bias, levels), rtol=1e-5, atol=1e-5)


@levels_of_any_cpu
@pytest.mark.parametrize(("size", "out"), SHAPES)
def test_a_normal_row_differs_from_fp32_by_less_than_two_percent(size, out, levels):
    weight, bias, x = randn(out, size), randn(out, seed=1), randn(32, size, seed=2)
    want = F.linear(x, weight, bias)
    assert (make(weight, bias, levels)(x) - want).norm() < 0.02 * want.norm()


def test_the_second_row_of_coarse_levels_leaves_only_the_error_of_the_weights():
    weight, x = randn(96, 576), randn(32, 576, seed=2)
    steps = weight.abs().amax(1, keepdim=True) / 127
    want = F.linear(x, torch.round(weight / steps) * steps)
    assert (make(weight, None, 63)(x) - want).norm() < 2e-4 * want.norm()


@levels_of_any_cpu
@pytest.mark.parametrize(("size", "out"), SHAPES)
def test_a_row_has_the_same_bits_among_any_number_of_rows(size, out, levels):
    linear = make(randn(out, size), randn(out, seed=1), levels)
    x = randn(70, size, seed=2)
    whole = linear(x)
    for rows in range(1, 65):
        assert torch.equal(linear(x[:rows]), whole[:rows]), rows
    for row in range(0, 70, 7):
        assert torch.equal(linear(x[row : row + 1]), whole[row : row + 1]), row


@pytest.mark.parametrize("outlier", [200.0, 1e30, float("inf"), float("nan")])
@levels_of_any_cpu
def test_a_neighbours_outlier_changes_no_bit_of_another_row(outlier, levels):
    linear, x = make(randn(96, 64), None, levels), randn(5, 64, seed=2)
    quiet = linear(x)
    x[2, 7] = outlier
    loud = linear(x)
    others = [0, 1, 3, 4]
    assert torch.equal(loud[others], quiet[others])


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@levels_of_any_cpu
def test_a_row_that_is_not_finite_gives_no_finite_result(value, levels):
    x = randn(3, 64, seed=2)
    x[1, 5] = value
    assert not make(randn(96, 64), None, levels)(x)[1].isfinite().any()


@pytest.mark.parametrize("value", [0.0, 1e-42])
def test_a_row_of_zeros_gives_the_bias(value):
    bias = randn(9, seed=1)
    assert torch.equal(make(randn(9, 16), bias)(torch.full((2, 16), value)), bias.expand(2, -1))


def test_an_output_channel_of_zeros_gives_zeros():
    weight = randn(9, 16)
    weight[4] = 0
    assert not make(weight)(randn(3, 16, seed=1))[:, 4].any()


@pytest.mark.parametrize("threads", [1, 2])
def test_the_number_of_threads_changes_no_bit(threads):
    before = torch.get_num_threads()
    linear, x = make(randn(300, 8192)), randn(40, 8192, seed=2)
    whole = linear(x)
    try:
        torch.set_num_threads(threads)
        assert torch.equal(torch.cat([linear(x[i : i + 1]) for i in range(40)]), whole)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(6,), (1, 6), (1, 1, 6), (1, 5, 6), (2, 3, 6), (0, 6)])
def test_it_keeps_the_leading_dimensions(shape):
    x = randn(*shape, seed=3)
    assert make(randn(3, 6))(x).shape == (*shape[:-1], 3)


def test_it_takes_rows_that_are_not_contiguous_and_leaves_them_as_they_are():
    linear, x = make(randn(3, 6)), randn(6, 8, seed=3).t()
    assert torch.equal(linear(x), linear(x.contiguous()))
    assert torch.equal(x, randn(6, 8, seed=3).t())


def test_rows_whose_sums_would_overflow_are_refused():
    with pytest.raises(FailedPreconditionError, match=f"has {MAX_IN_FEATURES + 1} inputs"):
        make(torch.ones(1, MAX_IN_FEATURES + 1))


def test_the_longest_row_of_the_largest_values_is_summed_without_overflow():
    x = torch.ones(1, MAX_IN_FEATURES)
    torch.testing.assert_close(
        make(torch.ones(2, MAX_IN_FEATURES))(x), torch.full((1, 2), float(MAX_IN_FEATURES))
    )


def test_packing_makes_every_linear_of_a_model_int8():
    model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 4, bias=False))
    model.requires_grad_(False)
    x = randn(3, 8)
    want = model(x)
    assert pack_linears(model, int8_linears()[0]) == 2
    assert all(type(child) is Int8Linear for child in model)
    assert (model(x) - want).norm() < 0.05 * want.norm()


def saturating(rows, packed, levels):
    """A CPU that adds pairs of products in 16 bits: AVX2 without VNNI."""
    weight = torch.ops.quantized.linear_unpack(packed)[0].int_repr().int()
    products = (rows.int() + levels)[:, None, :] * weight[None]
    pairs = products.unflatten(-1, (-1, 2)).sum(-1).clamp(-(2**15), 2**15 - 1)
    return (pairs.sum(-1) - levels * weight.sum(-1)).float()


def test_a_cpu_whose_products_saturate_gets_fewer_levels(monkeypatch):
    monkeypatch.setattr(quantized, "_product", saturating)
    assert exact_levels() == 63
    assert "2 x 7 bits" in int8_linears()[1]


def test_a_cpu_whose_products_are_always_wrong_is_refused(monkeypatch):
    monkeypatch.setattr(quantized, "_product", lambda rows, packed, levels: torch.zeros(9, 40))
    with pytest.raises(FailedPreconditionError, match="wrong on this CPU; use quantization none"):
        exact_levels()


def test_a_torch_without_the_operators_is_refused(monkeypatch):
    monkeypatch.setattr(quantized, "can_quantize", lambda: False)
    with pytest.raises(FailedPreconditionError, match="no FBGEMM; use quantization none"):
        exact_levels()
