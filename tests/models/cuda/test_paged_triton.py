"""Attention by Triton kernels equals the formula in fp64, run by Triton's interpreter."""

import numpy as np
import pytest
import torch
from models.naive_attention import Rule, make_sequences, naive, run_step

from redmux_server.models.cuda.paged_cache import PagedKVCache
from redmux_server.models.kvcache import LayerShape

TritonAttention = pytest.importorskip("redmux_server.models.cuda.paged_triton").TritonAttention
SHAPES = {
    "equal": LayerShape(2, 2, 16),
    "grouped": LayerShape(6, 2, 20),
    "one": LayerShape(3, 1, 8),
}


def make_cache(shape, num_blocks, num_multiprocessors=1):
    attention = TritonAttention(num_multiprocessors)
    cache = PagedKVCache([shape], num_blocks, attention, torch.device("cpu"), torch.float32)
    cache.poison(range(num_blocks), float("nan"))  # what is unwritten must not be read
    return cache


@pytest.mark.parametrize("rule", [Rule(0.2), Rule(0.1, window=33), Rule(0.2, softcap=3.0)])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_chunks_mixed_with_decodes_equal_the_formula(shape, rule):
    (a, b, c), num_blocks = make_sequences(0, shape, [91, 36, 5])
    cache = make_cache(shape, num_blocks)
    run_step(cache, [(a, 0, 60), (b, 0, 35)], rule)
    parts = [(b, 35, 36), (a, 60, 90), (c, 0, 4)]
    decodes = [(a, 90, 91), (c, 4, 5)]
    for step in (parts, decodes):
        for (sequence, start, stop), got in zip(step, run_step(cache, step, rule), strict=True):
            np.testing.assert_allclose(got, naive(sequence, rule)[start:stop], atol=2e-5)


@pytest.mark.parametrize("window", [0, 70])
def test_keys_that_are_cut_into_parts_join_to_the_formula(window):
    shape, rule = LayerShape(2, 1, 16), Rule(0.2, window)
    (a, b), num_blocks = make_sequences(1, shape, [210, 3])  # four parts, of which b has one
    cache = make_cache(shape, num_blocks, num_multiprocessors=8)
    run_step(cache, [(a, 0, 209), (b, 0, 2)], rule)
    for sequence, got in zip(
        (a, b), run_step(cache, [(a, 209, 210), (b, 2, 3)], rule), strict=True
    ):
        np.testing.assert_allclose(got, naive(sequence, rule)[-1:], atol=2e-5)


def test_one_request_more_fits_between_two_tiles():
    # 64 rows of a program are 21 tokens of three heads: ends and starts fall anywhere in a tile.
    shape, rule = LayerShape(3, 1, 8), Rule(0.2)
    lengths = [1, 20, 21, 22, 43, 2]
    sequences, num_blocks = make_sequences(2, shape, lengths)
    cache = make_cache(shape, num_blocks)
    step = [(s, 0, len(s)) for s in sequences]
    for sequence, got in zip(sequences, run_step(cache, step, rule), strict=True):
        np.testing.assert_allclose(got, naive(sequence, rule), atol=2e-5)
