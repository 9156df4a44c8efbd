"""What is left to torch in a served model gives a row the same bits with any number of threads."""

import pytest
import torch
from conftest import save_tiny_model
from encoders import CONFIGS, save_tiny_encoder
from transformers import GPT2Config, MixtralConfig

from redmux_server.config import ServerConfig
from redmux_server.device import choose
from redmux_server.engine.request import Reading, Request, SamplingParams, Work
from redmux_server.models.encoder.load import load_encoder
from redmux_server.models.load_causal import load_causal

THREADS = 3
# Some twenty tokens are enough for torch to cut so wide an activation into a piece for each thread,
# of which the first two end inside a row.
WIDTH = 4096


def work(prompt):
    request = Request(
        prompt_ids=prompt, max_tokens=0, sampling=SamplingParams(), stop_token_ids=frozenset(),
        tenant="", adapter=None, logprobs=False, sink=lambda event: None, reading=Reading(None),
    )  # fmt: skip
    return Work(request, len(prompt))


@pytest.mark.parametrize("activation", ["gelu_pytorch_tanh", "silu", "gelu"])
def test_an_encoders_rows_do_not_depend_on_how_many_there_are(tmp_path, activation, monkeypatch):
    options = {
        "vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": WIDTH, "hidden_act": activation, "max_position_embeddings": 130,
    }  # fmt: skip
    monkeypatch.setitem(CONFIGS, "wide", ("bert", options))
    save_tiny_encoder(tmp_path, "wide")
    config = ServerConfig(model=str(tmp_path), threads=THREADS)
    loaded = load_encoder(config, choose(config))
    assert loaded.bit_identical
    loaded.runner.enter_thread()
    prompts = [[3 + (7 * i + j) % 250 for j in range(n)] for i, n in enumerate((9, 5, 8, 7, 2, 6))]
    alone = [loaded.runner.hidden([work(prompt)])[0] for prompt in prompts]
    for count in range(2, len(prompts) + 1):
        mixed = loaded.runner.hidden([work(prompt) for prompt in prompts[:count]])
        assert all(map(torch.equal, alone, mixed)), count


def load_decoder(folder, config):
    save_tiny_model(folder, config)
    server = ServerConfig(model=str(folder), kv_cache_tokens=512, threads=THREADS)
    return load_causal(server, choose(server))


def test_a_decoder_that_transformers_runs_is_bit_identical_with_any_number_of_threads(tmp_path):
    config = GPT2Config(
        vocab_size=260, n_positions=128, n_embd=64, n_layer=1, n_head=2, n_inner=WIDTH,
        activation_function="gelu_pytorch_tanh",
    )  # fmt: skip
    assert load_decoder(tmp_path, config).bit_identical


def test_a_model_with_products_of_torchs_promises_no_bits(tmp_path):
    config = MixtralConfig(
        vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=1, num_experts_per_tok=1,
        max_position_embeddings=128,
    )  # fmt: skip
    assert not load_decoder(tmp_path, config).bit_identical
