"""Packed linears whose products are rounded: int8 and bf16, exact in themselves."""

import numba
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from redmux.errors import FailedPreconditionError
from redmux_server.models.cpu import packing as module
from redmux_server.models.cpu.accelerate import pack_linears
from redmux_server.models.cpu.arithmetic import HAS_AVX2, HAS_BF16, HAS_VNNI
from redmux_server.models.cpu.packed_linear import PackedLinear, packed_linear
from redmux_server.models.cpu.tile_permission import why_no_tiles

pytestmark = pytest.mark.skipif(not HAS_AVX2, reason="int8 needs AVX2")

# (in_features, out_features): odd, wide, tall, and long enough to be split over threads.
SHAPES = [(4, 4), (33, 7), (64, 260), (257, 129), (576, 1536), (1536, 576), (8192, 96)]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# What activations are rounded to: bytes where the CPU multiplies them, else 16 bits.
KINDS = {
    "pairs": (np.int16, np.int16, 2, False),
    "bytes": (np.uint8, np.int32, 4, False),
    "tiles": (np.uint8, np.int32, 4, True),
}
HAS = ["pairs"] + ["bytes"] * HAS_VNNI + ["tiles"] * (why_no_tiles() is None)
on_any_cpu = pytest.mark.parametrize("activation", HAS)


def make(weight, bias=None, activation=None):
    with pytest.MonkeyPatch.context() as patch:
        if activation is not None:
            layout = module._Layout(*KINDS[activation])
            patch.setattr(module, "_layout", lambda precision: layout)
        return packed_linear(weight, bias, "int8")


def by_hand(x, weight, bias):
    """The same rounding: a step for every channel, and for every 64 inputs of a row."""
    steps = weight.abs().amax(1, keepdim=True) / 127
    parts = []
    for part in x.split(64, dim=1):
        step = (part.abs().amax(1, keepdim=True) / 127).clamp_min(1e-30)
        parts.append(torch.round(part * (1 / step)).double() * step)
    y = torch.cat(parts, 1) @ (torch.round(weight / steps).double() * steps).t()
    return y if bias is None else y + bias.double()


@on_any_cpu
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(("size", "out"), SHAPES)
def test_it_is_the_product_of_rounded_rows_and_rounded_weights(size, out, has_bias, activation):
    weight, x = randn(out, size), randn(5, size, seed=2)
    bias = randn(out, seed=1) if has_bias else None
    got = make(weight, bias, activation)(x).double()
    torch.testing.assert_close(got, by_hand(x, weight, bias), rtol=1e-5, atol=1e-4)


@on_any_cpu
@pytest.mark.parametrize(("size", "out"), SHAPES)
def test_a_normal_row_differs_from_fp32_by_less_than_two_percent(size, out, activation):
    weight, bias, x = randn(out, size), randn(out, seed=1), randn(32, size, seed=2)
    want = F.linear(x, weight, bias)
    assert (make(weight, bias, activation)(x) - want).norm() < 0.02 * want.norm()


@pytest.mark.skipif(not HAS_VNNI, reason="this CPU does not multiply bytes")
def test_cpus_with_and_without_products_of_bytes_give_the_same_bits():
    weight, bias, x = randn(96, 577), randn(96, seed=1), randn(9, 577, seed=2)
    assert torch.equal(make(weight, bias, "bytes")(x), make(weight, bias, "pairs")(x))


@on_any_cpu
def test_an_outlier_spoils_only_the_inputs_that_share_its_step(activation):
    """One input is 1000 times the others: rounded by its step, they would all be zero."""
    weight, x = randn(96, 576), randn(8, 576, seed=2)
    weight[:, 100] = 0
    quiet = make(weight, None, activation)(x)
    x[:, 100] = 1000
    loud = make(weight, None, activation)(x)
    assert (loud - quiet).norm() < 0.4 * quiet.norm()  # 63 of 576 inputs are lost


@pytest.mark.skipif(not HAS_BF16, reason="this CPU has no products of bf16")
@pytest.mark.parametrize(("size", "out"), SHAPES)
def test_products_of_bf16_are_those_of_rounded_rows_and_weights(size, out):
    weight, bias, x = randn(out, size), randn(out, seed=1), randn(5, size, seed=2)
    x[0, 0], x[1, 1] = 0, -1e-30
    got = packed_linear(weight, bias, "bf16")(x)
    rounded = (value.to(torch.bfloat16).double() for value in (x, weight))
    want = F.linear(*rounded, bias.double())
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-5 * size**0.5)


@pytest.mark.parametrize("precision", ["int8"] + ["bf16"] * HAS_BF16)
@pytest.mark.parametrize(("size", "out"), SHAPES)
def test_a_row_has_the_same_bits_among_any_number_of_rows(size, out, precision):
    linear = packed_linear(randn(out, size), randn(out, seed=1), precision)
    x = randn(70, size, seed=2)
    whole = linear(x)
    for rows in range(1, 65):
        assert torch.equal(linear(x[:rows]), whole[:rows]), rows
    for row in range(0, 70, 7):
        assert torch.equal(linear(x[row : row + 1]), whole[row : row + 1]), row


@pytest.mark.parametrize("outlier", [200.0, 1e30, float("inf"), float("nan")])
@on_any_cpu
def test_a_neighbours_outlier_changes_no_bit_of_another_row(outlier, activation):
    linear, x = make(randn(96, 64), None, activation), randn(5, 64, seed=2)
    quiet = linear(x)
    x[2, 7] = outlier
    loud = linear(x)
    others = [0, 1, 3, 4]
    assert torch.equal(loud[others], quiet[others])


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@on_any_cpu
def test_a_row_that_is_not_finite_gives_no_finite_result(value, activation):
    x = randn(3, 64, seed=2)
    x[1, 5] = value
    assert not make(randn(96, 64), None, activation)(x)[1].isfinite().any()


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
    before = numba.get_num_threads()
    linear, x = make(randn(300, 8192)), randn(40, 8192, seed=2)
    whole = linear(x)
    try:
        numba.set_num_threads(threads)
        assert torch.equal(torch.cat([linear(x[i : i + 1]) for i in range(40)]), whole)
    finally:
        numba.set_num_threads(before)


@pytest.mark.parametrize("shape", [(6,), (1, 6), (1, 1, 6), (1, 5, 6), (2, 3, 6), (0, 6)])
def test_it_keeps_the_leading_dimensions(shape):
    x = randn(*shape, seed=3)
    assert make(randn(3, 6))(x).shape == (*shape[:-1], 3)


def test_it_takes_rows_that_are_not_contiguous_and_leaves_them_as_they_are():
    linear, x = make(randn(3, 6)), randn(6, 8, seed=3).t()
    assert torch.equal(linear(x), linear(x.contiguous()))
    assert torch.equal(x, randn(6, 8, seed=3).t())


@on_any_cpu
def test_a_long_row_of_the_largest_values_is_summed_without_overflow(activation):
    size = 200_000
    got = make(torch.ones(2, size), None, activation)(torch.ones(1, size))
    torch.testing.assert_close(got, torch.full((1, 2), float(size)))


def test_packing_makes_every_linear_of_a_model_int8():
    model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 4, bias=False))
    model.requires_grad_(False)
    x = randn(3, 8)
    want = model(x)
    assert pack_linears(model, "int8") == 2
    assert all(type(child) is PackedLinear for child in model)
    assert (model(x) - want).norm() < 0.05 * want.norm()


@pytest.mark.parametrize(
    ("precision", "needed"), [("int4", "AVX2"), ("int8", "AVX2"), ("bf16", "AVX-512 BF16")]
)
def test_a_cpu_without_such_products_is_told_what_it_lacks(monkeypatch, precision, needed):
    for feature in ("HAS_AVX2", "HAS_VNNI", "HAS_BF16"):
        monkeypatch.setattr(module, feature, False)
    with pytest.raises(FailedPreconditionError, match=f"products of {precision} need .* {needed}"):
        packed_linear(randn(4, 4), None, precision)
