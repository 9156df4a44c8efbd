"""PackedLinear: the same mathematics as F.linear, with bits that no other row can change."""

import gc
import weakref

import numba
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from redmux_server.models.cpu.accelerate import pack_linears
from redmux_server.models.cpu.packed_linear import PackedLinear, packed_linear

# (in_features, out_features): odd, wide, tall, and deep enough to be multiplied in parts.
SHAPES = [(4, 4), (33, 7), (64, 260), (257, 129), (576, 1536), (1536, 576), (8192, 96)]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(("size", "out"), SHAPES)
def test_it_equals_linear(size, out, has_bias):
    weight = randn(out, size)
    bias = randn(out, seed=1) if has_bias else None
    packed = packed_linear(weight, bias)
    for rows in (1, 2, 31):
        x = randn(rows, size, seed=rows)
        want = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        torch.testing.assert_close(packed(x).double(), want, rtol=0, atol=2e-5 * size**0.5)


@pytest.mark.parametrize(("size", "out"), SHAPES)
def test_a_row_has_the_same_bits_among_any_number_of_rows(size, out):
    packed = packed_linear(randn(out, size), randn(out, seed=1))
    x = randn(70, size, seed=2)
    whole = packed(x)
    for rows in range(1, 71):
        assert torch.equal(packed(x[:rows]), whole[:rows]), rows
    for row in range(0, 70, 7):
        assert torch.equal(packed(x[row : row + 1]), whole[row : row + 1]), row


def test_a_row_has_the_same_bits_whatever_the_threads_and_how_tall_the_batch():
    packed, x = packed_linear(randn(96, 576), randn(96)), randn(300, 576, seed=2)
    before = numba.get_num_threads()
    try:
        results = []
        for threads in range(1, numba.config.NUMBA_NUM_THREADS + 1):
            numba.set_num_threads(threads)
            results.append(packed(x))
            results.append(torch.cat([packed(part) for part in x.split(7)]))
    finally:
        numba.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("shape", [(6,), (1, 6), (1, 1, 6), (1, 5, 6), (2, 3, 6)])
def test_it_keeps_the_leading_dimensions(shape):
    packed = packed_linear(randn(3, 6), None)
    x = randn(*shape, seed=3)
    want = F.linear(x, randn(3, 6))
    assert packed(x).shape == want.shape
    torch.testing.assert_close(packed(x), want)


def test_it_takes_rows_that_are_not_contiguous():
    packed, x = packed_linear(randn(3, 6), None), randn(6, 8, seed=3).t()
    assert torch.equal(packed(x), packed(x.contiguous()))


class Tied(nn.Module):
    """An embedding whose weight is the output head's, and a stack with both kinds of linear."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 6), Conv1D(8, 6), nn.Linear(8, 8, bias=False)])
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        for parameter in self.parameters():
            parameter.data = randn(*parameter.shape, seed=parameter.numel())
            parameter.requires_grad_(False)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def test_packing_replaces_every_linear_and_conv1d_and_changes_no_result():
    model, ids = Tied(), torch.arange(11)
    want = model(ids)
    assert pack_linears(model) == 4
    assert not any(isinstance(m, nn.Linear | Conv1D) for m in model.modules())
    torch.testing.assert_close(model(ids), want)


def test_packing_leaves_module_paths_and_their_order_as_they_are():
    model = Tied()
    before = [name for name, _ in model.named_modules()]
    pack_linears(model)
    assert [name for name, _ in model.named_modules()] == before


def test_a_packed_conv1d_computes_what_it_did():
    model = nn.ModuleDict({"conv": Conv1D(5, 9)})
    model["conv"].weight.data = randn(9, 5)
    model["conv"].bias.data = randn(5, seed=1)
    x = randn(4, 9, seed=2)
    want = x @ randn(9, 5) + randn(5, seed=1)
    pack_linears(model)
    assert isinstance(model["conv"], PackedLinear)
    torch.testing.assert_close(model["conv"](x), want)


def test_a_tied_embedding_keeps_its_weight():
    model = Tied()
    weight = model.embed.weight.clone()
    pack_linears(model)
    assert torch.equal(model.embed.weight, weight)
    assert torch.equal(model.embed(torch.arange(11)), weight)


def test_packing_releases_the_weights_that_nobody_shares():
    model = Tied()
    own, shared = (weakref.ref(m.weight) for m in (model.layers[0], model.embed))
    pack_linears(model)
    gc.collect()
    assert own() is None
    assert shared() is not None


def test_a_subclass_of_linear_is_left_alone():
    class Special(nn.Linear):
        pass

    model = nn.ModuleDict({"x": Special(3, 3)})
    assert pack_linears(model) == 0
    assert type(model["x"]) is Special
