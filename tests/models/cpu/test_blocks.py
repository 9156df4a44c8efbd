"""Weights of 4 and 8 bits with a step for every 32 inputs: as files have them, or rounded."""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from torch import nn

from redmux_server.models.cpu import aligned
from redmux_server.models.cpu.arithmetic import HAS_AVX2, PANEL
from redmux_server.models.cpu.block_kernel import BLOCK, block_bytes
from redmux_server.models.cpu.block_weights import fill_panels, is_on_grids, rounded
from redmux_server.models.cpu.embeddings import Embeddings
from redmux_server.models.cpu.packed_linear import packed_linear

needs_products = pytest.mark.skipif(not HAS_AVX2, reason="int4 needs AVX2")
# (in_features, out_features): odd, less than a block, and several panels of several blocks.
SHAPES = [(4, 4), (33, 7), (257, 70)]
is_head = pytest.mark.parametrize("is_head", [False, True])


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def as_in_a_file(kind, shape=(40, 64), size=1.0):
    """Returns weights as a GGUF file of this kind gives them."""
    data = gguf.quants.quantize((randn(*shape) * size).numpy(), kind)
    return torch.from_numpy(gguf.quants.dequantize(data, kind))


def filled(weight, bits):
    """Returns the panels of these weights, their scales, and whether they are exact."""
    num_panels, num_blocks = -(-len(weight) // PANEL), -(-weight.shape[1] // BLOCK)
    panels = np.zeros((num_panels, num_blocks, block_bytes(bits)), np.uint8)
    scale = np.zeros(len(weight), np.float32)
    return panels, scale, fill_panels(panels, scale, weight, bits)


def read(panels, scale, bits):
    """Returns the weights that panels hold, by the layout that `block_kernel` describes."""
    end = panels.shape[2] - 4 * PANEL
    lines = panels[:, :, :end].reshape(*panels.shape[:2], BLOCK // 4, -1, 4)
    if bits == 4:
        lines = np.concatenate([lines & 15, lines >> 4], 3)
    steps, origins = (
        panels[:, :, end + 2 * PANEL * part :][:, :, : 2 * PANEL].copy().view(np.float16)
        for part in (0, 1)
    )
    levels = lines.transpose(0, 3, 1, 2, 4).reshape(len(panels), PANEL, -1, BLOCK)
    values = [x.astype(np.float32).transpose(0, 2, 1)[..., None] for x in (origins, steps)]
    rows = (values[0] + values[1] * levels).reshape(len(panels) * PANEL, -1)[: len(scale)]
    return torch.from_numpy(rows * scale[:, None])


@pytest.mark.parametrize("size", [1e-6, 0.05, 3e4])
@pytest.mark.parametrize(("kind", "bits"), [(Kind.Q4_0, 4), (Kind.Q4_1, 4), (Kind.Q8_0, 8)])
def test_weights_of_a_file_are_taken_as_they_are(kind, bits, size):
    if kind == Kind.Q4_0:
        weight = as_in_a_file(kind, size=size)
    else:
        weight = as_in_a_file(kind) * 2.0 ** round(np.log2(size))  # files have steps of fp16
    panels, scale, is_exact = filled(weight, bits)
    assert is_exact
    assert torch.equal(read(panels, scale, bits), weight)


def test_steps_that_fp16_has_not_are_rounded_and_nothing_else():
    """As those of Q4_K are, products of two numbers."""
    levels = torch.randint(0, 16, (50, BLOCK), generator=torch.Generator().manual_seed(0))
    steps, origins = randn(50, 1, seed=1), randn(50, 1, seed=2)
    blocks = steps * levels + origins
    blocks *= 2**13 / blocks.abs().max()
    span = blocks.amax(1) - blocks.amin(1)
    errors = (rounded(blocks, 4).values() - blocks).abs().amax(1)
    assert (errors < 2e-3 * span).all()


@pytest.mark.parametrize(("bits", "largest"), [(4, 0.09), (8, 0.008)])
def test_other_weights_are_rounded_to_about_half_a_step(bits, largest):
    weight = randn(70, 100)
    panels, scale, is_exact = filled(weight, bits)
    assert not is_exact
    got = read(panels, scale, bits)
    assert (got[:, :100] - weight).norm() < largest * weight.norm()


def test_a_model_has_4_bits_if_every_layer_but_the_head_has():
    layer, head = nn.Linear(64, 40, bias=False), nn.Linear(64, 40, bias=False)
    model = nn.Sequential(layer, head).requires_grad_(False)
    model.get_output_embeddings = lambda: head
    assert not is_on_grids(model)
    layer.weight.data = as_in_a_file(Kind.Q4_1)
    assert is_on_grids(model)
    model.get_output_embeddings = lambda: None
    assert not is_on_grids(model)


def by_hand(x, weight):
    """Returns x @ weight.T, with x rounded for every 32 inputs of a row."""
    parts = []
    for part in x.split(BLOCK, dim=1):
        step = (part.abs().amax(1, keepdim=True) / 127).clamp_min(1e-30)
        parts.append(torch.round(part * (1 / step)).double() * step)
    return torch.cat(parts, 1) @ weight.double().t()


@needs_products
@is_head
@pytest.mark.parametrize(("size", "out"), SHAPES)
def test_products_are_those_of_rounded_rows_and_weights(size, out, is_head):
    weight, bias, x = randn(out, size), randn(out, seed=1), randn(5, size, seed=2)
    held = read(*filled(weight, 8 if is_head else 4)[:2], 8 if is_head else 4)[:, :size]
    got = packed_linear(weight, bias, "int4", is_head)(x).double()
    torch.testing.assert_close(got, by_hand(x, held) + bias.double(), rtol=1e-5, atol=1e-4)


@needs_products
@is_head
def test_a_row_has_the_same_bits_among_any_number_of_rows(is_head):
    linear, x = packed_linear(randn(70, 257), None, "int4", is_head), randn(70, 257, seed=2)
    whole = linear(x)
    for rows in [*range(1, 20), 33]:
        assert torch.equal(linear(x[:rows]), whole[:rows]), rows
    for row in range(0, 70, 7):
        assert torch.equal(linear(x[row : row + 1]), whole[row : row + 1]), row


@needs_products
@pytest.mark.parametrize("value", [1e30, float("inf"), float("nan")])
def test_what_a_row_holds_changes_no_bit_of_another_and_does_not_stay(value):
    """33 inputs are two blocks and padding, whose step another row may have left behind."""
    linear, x = packed_linear(randn(40, 33), None, "int4"), randn(5, 33, seed=2)
    quiet = linear(x)
    x[2, 7] = value
    loud, others = linear(x), [0, 1, 3, 4]
    assert torch.equal(loud[others], quiet[others])
    assert value == 1e30 or not loud[2].isfinite().any()


@needs_products
def test_a_row_or_an_output_of_zeros_gives_the_bias():
    weight, bias = randn(9, 40), randn(9, seed=1)
    weight[4] = 0
    linear = packed_linear(weight, bias, "int4")
    assert torch.equal(linear(torch.zeros(2, 40)), bias.expand(2, -1))
    assert torch.equal(linear(randn(2, 40))[:, 4], bias[4].expand(2))


def digest(is_head):
    linear = packed_linear(randn(70, 257), None, "int4", is_head)
    return hashlib.sha256(linear(randn(9, 257, seed=1)).numpy()).hexdigest()


@needs_products
@pytest.mark.slow  # all of its kernels are compiled for the other kind of CPU
def test_cpus_with_and_without_products_of_bytes_give_the_same_bits():
    makefile = (Path(__file__).parents[3] / "Makefile").read_text(encoding="utf-8")
    features = re.search(r"^AVX2 := (\S+)$", makefile, re.MULTILINE)[1]
    code = "from test_blocks import digest; print(digest(False), digest(True))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parent,
        env=os.environ | {
            "NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": features,
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
    )  # fmt: skip
    assert done.stdout.split() == [digest(False), digest(True)]


@pytest.mark.parametrize(
    ("table", "bytes_each"),
    [
        (as_in_a_file(Kind.Q8_0), 1.125),
        (randn(40, 64).bfloat16().float(), 2),
        (randn(40, 50).bfloat16().float(), 2),
        (randn(40, 64), 4),
    ],
    ids=["8 bits", "bf16", "no whole blocks", "fp32"],
)
def test_embeddings_are_as_small_as_gives_them_back_as_they_are(table, bytes_each):
    table[3] = 0
    embeddings = Embeddings(table)
    ids = torch.tensor([3, 39, 0, 3])
    assert embeddings.num_bytes == table.numel() * bytes_each
    assert torch.equal(embeddings(ids), table[ids])


def test_memory_that_was_given_back_can_be_used_again():
    array = aligned.zeros(1 << 20, np.float32)
    array[...] = 1
    aligned.give_back(array)
    assert sys.platform != "linux" or not array[1024:-1024].any()
    array[...] = 2
    assert (array == 2).all()
