"""Packed attention of an encoder: MPNet's bias by distance is the matrix that transformers has."""

import torch
from transformers import MPNetConfig, MPNetModel

from redmux_server.models.encoder.packed_sequences import attach_packed


@torch.inference_mode()
def test_the_bias_of_a_sequence_is_that_of_transformers_in_every_dtype():
    config = MPNetConfig(
        vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=40,
    )  # fmt: skip
    model = MPNetModel(config).eval()
    lengths = (1, 2, 7, 38)
    wanted = [model.encoder.compute_position_bias(torch.empty(1, n, 1))[0] for n in lengths]
    attention = attach_packed(model, 38)
    for n, want in zip(lengths, wanted, strict=True):
        assert torch.equal(attention._mask(n)[0], want)
    exact = torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    with attention.step([0, 2, 9]):
        ours = attention(*exact, 0.4)
        attention.bias = attention.bias.double()
        plain = attention(*(x.double() for x in exact), 0.4)
    torch.testing.assert_close(ours.double(), plain, atol=1e-6, rtol=0)
