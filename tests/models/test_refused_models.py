"""Models at the edge of what is served: they start, or say in one sentence why they do not."""

import json

import numba
import pytest
import torch
from conftest import save_tiny_model
from models.causal.architectures import EXPERTS, GROUPED, LLAMA, SMALL, WINDOW
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM

from redmux.errors import FailedPreconditionError, InvalidArgumentError
from redmux_server.config import ServerConfig
from redmux_server.device import choose
from redmux_server.engine.request import Request, SamplingParams, Work
from redmux_server.models.kvcache import total_bytes
from redmux_server.models.load import load

ENCODER = SMALL | {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 128,
}  # fmt: skip
T5 = {
    "vocab_size": 260, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 2,
    "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
STARTED_T5 = T5 | {"decoder_start_token_id": 0}


def served(folder, **options):
    config = ServerConfig(model=str(folder), **{"kv_cache_tokens": 512, "threads": 1} | options)
    return load(config, choose(config))


def save(folder, model_type, options, kind=None):
    return save_tiny_model(folder, AutoConfig.for_model(model_type, **options), kind=kind)


def change_config(folder, **values):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def test_an_encoder_without_a_table_of_positions_is_served(tmp_path):
    loaded = served(save(tmp_path, "eurobert", ENCODER, kind=AutoModel))
    assert (loaded.max_context, loaded.bit_identical) == (128, True)


def test_attention_in_chunks_is_served_up_to_the_length_of_one(tmp_path):
    options = EXPERTS | {"intermediate_size_mlp": 96, "attention_chunk_size": 16}
    loaded = served(save(tmp_path, "llama4_text", options))
    assert loaded.max_context == 16
    assert any("attention in chunks of that size is not known" in why for why in loaded.reasons)


def test_a_decoder_whose_class_hides_its_stack_gives_vectors(tmp_path):
    options = EXPERTS | {"intermediate_size_mlp": 96, "attention_chunk_size": 128}
    runner = served(save(tmp_path, "llama4_text", options)).runner
    request = Request(
        prompt_ids=[5, 7, 9], max_tokens=0, sampling=SamplingParams(), stop_token_ids=frozenset(),
        tenant="", adapter=None, logprobs=False, sink=lambda event: None,
    )  # fmt: skip
    request.blocks = [0]
    assert runner.hidden([Work(request, 3)])[0].shape == (3, 64)


def test_a_window_that_no_layer_uses_limits_nothing(tmp_path):
    options = GROUPED | WINDOW | {"use_sliding_window": True, "layer_types": ["full_attention"] * 2}
    assert served(save(tmp_path, "qwen2", options)).max_context == 128


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("diffllama", LLAMA, "a layer of it attends 2 times for each token"),
        ("gemma3_text", LLAMA | {"use_bidirectional_attention": True}, "it generates nothing"),
        ("llama", LLAMA | {"is_causal": False}, "'llama' with is_causal: false in config.json"),
    ],
)
def test_a_decoder_that_cannot_be_served_says_what_about_it(kind, options, reason, tmp_path):
    folder = save(tmp_path, kind, options)
    with pytest.raises(FailedPreconditionError, match=reason):
        served(folder)


def test_an_encoder_whose_layers_are_one_says_so(tmp_path):
    options = ENCODER | {"embedding_size": 32}
    folder = save(tmp_path, "albert", options, kind=AutoModel)
    change_config(folder, architectures=["AlbertModel"])
    with pytest.raises(InvalidArgumentError, match="cannot be edited layer by layer: 0 lists"):
        served(folder)


def test_a_model_with_a_vision_tower_is_refused_without_a_list_of_all_classes(tmp_path):
    folder = save(tmp_path, "llama", LLAMA)
    change_config(folder, model_type="mistral3", architectures=["Mistral3ForConditionalGeneration"])
    with pytest.raises(InvalidArgumentError, match="give the checkpoint of the text model") as err:
        served(folder)
    assert len(err.value.message) < 400


def test_a_t5_without_a_first_token_of_its_decoder_is_told_what_to_add(tmp_path):
    folder = save(tmp_path, "t5", T5, kind=AutoModelForSeq2SeqLM)
    change_config(folder, decoder_start_token_id=None)
    (folder / "generation_config.json").unlink(missing_ok=True)
    with pytest.raises(InvalidArgumentError, match="has no decoder_start_token_id; add it"):
        served(folder)


def test_the_threads_of_torch_are_set_after_those_of_the_kernels(monkeypatch):
    """Numba's first call in a process gives torch all cores."""
    from redmux_server.models.cpu.threads import set_threads

    order = []
    monkeypatch.setattr(numba, "set_num_threads", lambda n: order.append(("numba", n)))
    monkeypatch.setattr(torch, "set_num_threads", lambda n: order.append(("torch", n)))
    set_threads(1, computes_in_torch=True)
    set_threads(1, computes_in_torch=False)
    assert order == [("numba", 1), ("torch", 1)] * 2


@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder"])
def test_a_cache_beyond_the_memory_is_refused_with_what_there_is(kind, tmp_path):
    if kind == "decoder":
        folder = save(tmp_path, "llama", LLAMA)
    else:
        folder = save(tmp_path, "t5", STARTED_T5, kind=AutoModelForSeq2SeqLM)
    with pytest.raises(InvalidArgumentError, match=r"cpu has [0-9.,]+ GiB: [0-9]+ tokens at most"):
        served(folder, kv_cache_tokens=1 << 40)


def test_the_cache_of_an_encoder_decoder_fits_the_memory_by_itself(tmp_path):
    folder = save(tmp_path, "t5", STARTED_T5, kind=AutoModelForSeq2SeqLM)
    config = {"max_running": 1 << 16, "max_context": 1 << 24, "max_batch_tokens": 1 << 24}
    loaded = served(folder, kv_cache_tokens=0, **config)
    held = loaded.num_blocks * loaded.block_size * loaded.kv_bytes_per_token
    assert held <= total_bytes(loaded.device) / 4
