"""load_causal: sizes of context and cache, and what it makes of a model folder."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedConfig

from redmux.errors import FailedPreconditionError, InvalidArgumentError
from redmux_server.config import ServerConfig
from redmux_server.device import Choices
from redmux_server.models.causal import on_cpu, room
from redmux_server.models.causal.attention import attention_modules
from redmux_server.models.causal.context_limit import context_limit
from redmux_server.models.causal.torch_kvcache import TorchKVCache
from redmux_server.models.cpu.arithmetic import HAS_AVX2
from redmux_server.models.cpu.kvcache import NumbaKVCache
from redmux_server.models.cpu.packing import Packing
from redmux_server.models.kvcache import BLOCK, LayerRule, LayerShape
from redmux_server.models.load_causal import load_causal

needs_int8 = pytest.mark.skipif(not HAS_AVX2, reason="int8 needs AVX2")
SHAPES = [LayerShape(4, 2, 32)] * 3  # 2 * 3 * 2 * 32 values = 1536 bytes a token in fp32


def model(positions=256, dtype=torch.float32):
    return SimpleNamespace(
        config=PreTrainedConfig(max_position_embeddings=positions),
        dtype=dtype,
        device=torch.device("cpu"),
    )


@pytest.fixture(autouse=True)
def memory(monkeypatch):
    """Makes this much memory free."""

    def set_free(num_bytes):
        monkeypatch.setattr(room, "_free_bytes", lambda device: num_bytes)

    set_free(64 << 30)
    return set_free


def sizes(base=None, **options):
    base = base or model()
    limit = context_limit(base.config, [])
    per_token = room.kv_bytes_per_token(SHAPES, base.dtype)
    return room.context_and_cache(ServerConfig(**options), base.device, per_token, limit)


def test_the_context_is_the_models_by_default():
    assert sizes()[0] == 256


def test_the_context_can_be_shorter_than_the_models():
    assert sizes(max_context=100)[0] == 100


def test_a_context_longer_than_the_models_is_refused():
    with pytest.raises(
        InvalidArgumentError, match=r"max_context is 257, but can be 256 at most: .* positions end"
    ):
        sizes(max_context=257)


PHI3 = {
    "vocab_size": 260, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "original_max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 0,
    "pad_token_id": 0,
    "rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8},
}  # fmt: skip


@pytest.mark.parametrize("original", [128, 64])  # longer than the prompts of the check, shorter
def test_longrope_ends_the_context_where_it_would_change_the_positions_of_others(
    tmp_path, original
):
    """One position past it rescales all positions of the step, whosever they are."""
    from conftest import save_tiny_model
    from transformers import Phi3Config

    options = PHI3 | {"original_max_position_embeddings": original}
    folder = str(save_tiny_model(tmp_path, Phi3Config(**options)))
    loaded = load_causal(ServerConfig(model=folder), choices())
    assert loaded.max_context == original
    assert f"context: {original} tokens, longrope changes all positions beyond it" in loaded.reasons
    match = f"{original + 1}, but can be {original} at most: longrope"
    with pytest.raises(InvalidArgumentError, match=match):
        load_causal(ServerConfig(model=folder, max_context=original + 1), choices())


@pytest.mark.parametrize(
    ("options", "rules", "limit"),
    [
        ({"attention_chunk_size": 64}, [LayerRule(1.0, 0, 0.0)], 64),
        ({"sliding_window": 64}, [LayerRule(1.0, 0, 0.0)], 64),
        ({"sliding_window": 64}, [LayerRule(1.0, 0, 0.0), LayerRule(1.0, 64, 0.0)], 256),
        ({"sliding_window": None}, [LayerRule(1.0, 0, 0.0)], 256),
        (
            {"rope_parameters": {"full_attention": {
                "rope_type": "longrope", "original_max_position_embeddings": 64}}},
            [], 64,
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": 64}},
            [], 256,
        ),
    ],
)  # fmt: skip
def test_the_context_ends_before_attention_that_the_engine_does_not_have(options, rules, limit):
    config = SimpleNamespace(max_position_embeddings=256, **options)
    config.get_text_config = lambda: config
    assert context_limit(config, rules).num_tokens == limit


@pytest.mark.parametrize("positions", [None, 0])
def test_a_model_without_a_limit_takes_any_context(positions):
    assert sizes(model(positions), max_context=5000, kv_cache_tokens=8192)[0] == 5000


def test_the_context_is_never_longer_than_the_cache():
    assert sizes(kv_cache_tokens=128) == (128, 128)


@pytest.mark.parametrize(("asked", "got"), [(1, 32), (32, 32), (33, 64), (1000, 1024)])
def test_the_cache_is_whole_blocks_and_at_least_what_was_asked(asked, got):
    assert sizes(kv_cache_tokens=asked)[1] == got
    assert BLOCK == 32


def test_the_default_cache_is_no_larger_than_all_running_requests_can_fill():
    assert sizes(max_running=8)[1] == 8 * 256
    assert sizes(max_running=8, max_context=128)[1] == 8 * 128


def test_the_default_cache_has_a_bound_in_bytes():
    got = sizes(model(1 << 20), max_running=64)[1]
    assert (2 << 30) - BLOCK * 1536 < got * 1536 < (2 << 30) + BLOCK * 1536


def test_the_default_cache_takes_a_quarter_of_the_free_memory(memory):
    memory(4 * 1536 * 3200)
    assert sizes()[1] == 3200


def test_half_the_bytes_make_room_for_twice_the_tokens(memory):
    memory(4 * 1536 * 3200)
    assert sizes(model(dtype=torch.bfloat16))[1] == 6400


def choices(**options):
    values = {
        "device": torch.device("cpu"), "dtype": torch.float32, "num_threads": 2, "reasons": (),
    }  # fmt: skip
    names = {field.name for field in dataclasses.fields(Choices)}
    return Choices(**{k: v for k, v in (values | options).items() if k in names})


def test_fp32_on_the_cpu_has_the_exact_kernel():
    cache, reason = on_cpu.make_cache(SHAPES, 2, choices(), torch.float32)
    assert type(cache) is NumbaKVCache
    assert "exact" in reason


def test_everything_else_has_torchs_attention_and_says_why():
    shapes, dtype = [LayerShape(2, 1, 8)], torch.bfloat16
    cache, told = on_cpu.make_cache(shapes, 2, choices(dtype=dtype), dtype)
    assert type(cache) is TorchKVCache
    assert "not fp32" in told
    assert cache.layers[0].cache.dtype is torch.bfloat16


def test_a_model_is_loaded_checked_and_free_of_hooks(tiny_folder, base):
    threads = torch.get_num_threads()
    try:
        config = ServerConfig(model=str(tiny_folder), kv_cache_tokens=1024)
        loaded = load_causal(config, choices())
    finally:
        torch.set_num_threads(threads)
    assert loaded.fingerprint == base.fingerprint
    assert (loaded.vocab_size, loaded.max_context, loaded.num_blocks) == (260, 256, 32)
    assert loaded.codec.eos_token_ids == {0}
    assert loaded.bit_identical
    assert any("checked at start" in reason for reason in loaded.reasons)
    assert not any(m._forward_hooks for m in loaded.linears)


@pytest.mark.parametrize("is_fused", [True, False])
def test_keys_and_values_in_bf16_are_checked_and_exact_in_any_batch(
    tiny_folder, monkeypatch, is_fused
):
    if not is_fused:
        monkeypatch.setattr(on_cpu, "why_not_fusable", lambda model: "not now")
    threads, loaded = torch.get_num_threads(), {}
    try:
        for dtype in ("float32", "bfloat16"):
            config = ServerConfig(model=str(tiny_folder), kv_cache_tokens=1024, kv_dtype=dtype)
            loaded[dtype] = load_causal(config, choices())
    finally:
        torch.set_num_threads(threads)
    exact, rounded = loaded.values()
    assert rounded.runner.cache.dtype is torch.bfloat16
    assert rounded.bit_identical
    assert rounded.kv_bytes_per_token * 2 == exact.kv_bytes_per_token
    assert rounded.num_blocks == exact.num_blocks
    assert "keys and values bfloat16 (set by configuration)" in rounded.reasons


@pytest.fixture
def wrong_attention(monkeypatch):
    """A scale that is off by a fiftieth differs by less than rounding may."""

    def attach(model, cache):
        load_attach(model, cache)
        for module in attention_modules(model):
            module.scaling *= 1.02

    load_attach = on_cpu.attach
    monkeypatch.setattr(on_cpu, "why_not_fusable", lambda model: "not now")
    monkeypatch.setattr(on_cpu, "attach", attach)


@pytest.mark.usefixtures("wrong_attention")
def test_rounded_keys_do_not_hide_a_wrong_attention(tiny_folder):
    config = ServerConfig(model=str(tiny_folder), kv_cache_tokens=1024, kv_dtype="bfloat16")
    with pytest.raises(FailedPreconditionError, match="differs from the plain model by"):
        load_causal(config, choices())


@pytest.fixture
def int8(tiny_folder):
    """Loads the tiny model with int8 weights."""
    threads = torch.get_num_threads()
    config = ServerConfig(model=str(tiny_folder), kv_cache_tokens=1024, quantization="int8")
    yield lambda: load_causal(config, choices())
    torch.set_num_threads(threads)


@needs_int8
def test_int8_weights_leave_the_fingerprint_and_the_sites_as_they_are(int8, base):
    loaded = int8()
    assert loaded.fingerprint == base.fingerprint
    assert set(base.ffn) <= set(loaded.sites)
    assert {linear.packing.precision for linear in loaded.linears} == {"int8"}
    assert loaded.bit_identical


@needs_int8
@pytest.mark.usefixtures("wrong_attention")
def test_int8_does_not_hide_a_wrong_attention(int8):
    with pytest.raises(FailedPreconditionError, match="differs from the plain model by"):
        int8()


@needs_int8
def test_int8_weights_that_are_wrong_are_refused(int8, monkeypatch):
    fill = Packing.fill

    def flipped(self, i, weight, bias):
        fill(self, i, weight.flip(0) if self.precision == "int8" else weight, bias)

    monkeypatch.setattr(Packing, "fill", flipped)
    with pytest.raises(FailedPreconditionError, match="differs from the plain model by"):
        int8()


def test_a_single_short_request_at_a_time_still_leaves_room_for_the_check(tiny_folder):
    """Nobody set kv_cache_tokens, so nobody should be told that it is too small."""
    threads = torch.get_num_threads()
    try:
        config = ServerConfig(model=str(tiny_folder), max_running=1, max_context=64)
        assert load_causal(config, choices()).max_context == 64
    finally:
        torch.set_num_threads(threads)


def test_a_model_of_few_positions_is_served(tmp_path):
    """Learned positions shorter than the prompts of the start-up check."""
    from conftest import save_tiny_model
    from transformers import GPT2Config

    config = GPT2Config(
        vocab_size=260, n_embd=64, n_layer=2, n_head=2, n_positions=48,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    folder = save_tiny_model(tmp_path, config)
    config = ServerConfig(model=str(folder))
    loaded = load_causal(config, choices())
    assert loaded.max_context == 48
