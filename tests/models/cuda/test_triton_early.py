"""Kernels launched early read what others write only once those have ended.

What an earlier kernel writes is NaN until `gdc_wait`, which fills it in: so the kernel runs as if
it had been launched long before, by Triton's interpreter.
"""

import pytest
import torch

from redmux_server.models.cuda.paged_cache import AttentionRule
from redmux_server.models.cuda.paged_step import HostIndex, PagedStep
from redmux_server.models.kvcache import LayerShape

triton_early = pytest.importorskip("redmux_server.models.cuda.triton_early")
from redmux_server.models.cuda.paged_triton import TritonAttention  # noqa: E402
from redmux_server.models.cuda.triton_layers import rotate  # noqa: E402
from redmux_server.models.cuda.triton_products import FewRowProducts  # noqa: E402
from redmux_server.models.cuda.triton_tiles import Device  # noqa: E402


@pytest.fixture
def launch_early(monkeypatch):
    """Runs a call whose inputs `late` come into being at its first `gdc_wait`; counts `lead`."""

    def run(call, *late):
        values = [t.clone() for t in late]
        for tensor in late:
            tensor.fill_(torch.nan)
        waited, led = [], []

        def wait():
            if not waited:
                for tensor, value in zip(late, values, strict=True):
                    tensor.copy_(value)
            waited.append(1)

        monkeypatch.setattr(triton_early, "gdc_wait", wait)
        monkeypatch.setattr(triton_early, "gdc_launch_dependents", lambda: led.append(1))
        got = call()
        assert len(led) == len(waited) > 0, "every program must wait, and let the next one begin"
        return got

    return run


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture
def no_prefetch(monkeypatch):
    """The interpreter has no assembly; a prefetch changes no result."""
    import triton.language as tl

    monkeypatch.setattr(tl, "inline_asm_elementwise", lambda *args: None)


class Products:
    """Both kinds of few-row products with the same operands."""

    def __init__(self):
        device = Device(4, 100_000, True)
        self.plain, self.early = (
            FewRowProducts(24, 1e-5, torch.float32, device, early=e) for e in (False, True)
        )
        self.table, self.rows = randn(4, 200), torch.tensor([0, 3, 1], dtype=torch.int32)
        self.norm, self.weight = randn(24), randn(80, 24)

    def residual(self):
        return self.plain.start(torch.arange(3), randn(5, 24), self.norm)


def test_a_projection_waits_for_its_rows_and_their_squares(launch_early, no_prefetch):
    p = Products()
    want, residual = p.plain.project(p.residual(), p.weight, None), p.residual()
    got = launch_early(
        lambda: p.early.project(residual, p.weight, None), residual.h, residual.squares
    )
    assert torch.equal(got, want)


def test_a_gate_waits_for_its_rows_and_their_squares(launch_early, no_prefetch):
    p = Products()
    edits = p.table, p.rows, 3, 90
    want, residual = p.plain.gate(p.residual(), p.weight, None, *edits), p.residual()
    got = launch_early(
        lambda: p.early.gate(residual, p.weight, None, *edits), residual.h, residual.squares
    )
    assert torch.equal(got, want)


def test_an_addition_waits_for_its_inputs_and_the_residual(launch_early, no_prefetch):
    p = Products()
    inputs, want, got = randn(3, 40), p.residual(), p.residual()
    weight, edits = randn(24, 40), (p.norm, p.table, p.rows, 3)
    p.plain.add(want, inputs, weight, None, *edits)
    launch_early(lambda: p.early.add(got, inputs, weight, None, *edits), inputs, got.x)
    for name in ("x", "h", "squares"):
        assert torch.equal(getattr(got, name), getattr(want, name))


def test_a_rotation_waits_for_its_projection(launch_early):
    qkv, angles, slots = randn(2, 4 * 16), randn(9, 16), torch.tensor([3, 40])
    results = []
    for early in (False, True):
        keys, values = torch.zeros(2, 2, 32, 1, 16)

        def call(keys=keys, values=values, early=early):
            return rotate(
                qkv, keys, values, slots, torch.tensor([3, 8]), angles, angles, None,
                qkv, slots.int(), (-1, -1, -1), early=early,
            )  # fmt: skip

        query = launch_early(call, qkv) if early else call()
        results.append((query, keys, values))
    for want, got in zip(*results, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("num_multiprocessors", [1, 8])  # keys in one part, and in several
def test_attention_waits_for_queries_and_pages(num_multiprocessors, launch_early):
    shape = LayerShape(2, 1, 16)
    pages, query, blocks = randn(2, 8, 32, 1, 16), randn(1, 2, 16), torch.arange(8).int()[None]
    host = HostIndex.of_decodes(torch.tensor([200]).numpy(), blocks.numpy(), 32)
    one, count = torch.tensor([0, 1]).int(), torch.tensor([201]).int()
    step = PagedStep(host, one.long(), one, count, blocks, max_count=1, max_keys=256)
    attention = TritonAttention(num_multiprocessors)
    operands = step, AttentionRule(shape, 0.25, 0, 0.0), query, *pages
    want = attention(*operands)
    got = launch_early(lambda: attention.launched_early()(*operands), query, pages)
    assert torch.equal(got, want)
