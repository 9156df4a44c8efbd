"""Memory for packed weights: as much as is packed, used for that, and dropped with it."""

import gc
import json
import weakref

import numpy as np
import pytest
import torch
from conftest import save_tiny_model
from transformers import AutoConfig

from redmux_adapters import load_base
from redmux_adapters.bases.architectures import LLAMA_LIKE
from redmux_server.config import ServerConfig
from redmux_server.device import choose
from redmux_server.models.cpu import reservation
from redmux_server.models.cpu.arithmetic import HAS_AVX2
from redmux_server.models.cpu.fused_decoder import pack
from redmux_server.models.cpu.packing import Packing
from redmux_server.models.cpu.reservation import Reservation, product_shapes
from redmux_server.models.load_causal import load_causal

SHAPE = {
    "vocab_size": 260, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
MODEL_TYPES = {"llama": {"head_dim": 20}, "mistral": {}, "qwen2": {}, "qwen3": {"head_dim": 16}}


def save(folder, model_type="llama", **options):
    return save_tiny_model(folder, AutoConfig.for_model(model_type, **SHAPE | options))


@pytest.fixture
def count_shapes(monkeypatch):
    """Notes the shapes of every packing that is made."""
    made = []
    init = Packing.__init__

    def noting(self, shapes, precision="fp32", **options):
        made.append((precision, [*shapes]))
        init(self, shapes, precision, **options)

    monkeypatch.setattr(Packing, "__init__", noting)
    return made


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_config_tells_what_is_packed(tmp_path, model_type):
    folder = save(tmp_path, model_type, **MODEL_TYPES[model_type])
    model, _ = load_base(str(folder))
    assert type(model).__name__ in LLAMA_LIKE
    assert product_shapes(folder) == pack(model).shapes


def test_a_model_is_packed_into_the_room(tmp_path, count_shapes):
    folder = save(tmp_path)
    config = ServerConfig(model=str(folder), kv_cache_tokens=1024)
    loaded = load_causal(config, choose(config), Reservation(folder, choose(config)))
    assert count_shapes == [("fp32", [*loaded.linears[0].packing.shapes])]
    plain = load_causal(config, choose(config))
    panels = [x.linears[0].packing.packed.panels for x in (loaded, plain)]
    assert np.array_equal(*panels)


def test_room_of_another_size_is_not_used(tmp_path):
    """A config may say another size than the weights have."""
    folder = save(tmp_path)
    room = Packing([(8, 8)])
    model, _ = load_base(str(folder))
    packing = pack(model, room=room)
    assert packing is not room
    assert packing.shapes == product_shapes(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["GemmaForCausalLM"]},
        {"architectures": None},
        {"num_key_value_heads": None},
    ],
)
def test_nothing_is_reserved_for_a_model_whose_size_is_not_known(tmp_path, changes):
    folder = save(tmp_path)
    path = folder / "config.json"
    assert product_shapes(folder) is not None
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert product_shapes(folder) is None


@pytest.mark.parametrize("text", [None, "", "[]", "{}"])
def test_nothing_is_reserved_without_a_config(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    config = ServerConfig(model=str(tmp_path))
    assert Reservation(tmp_path, choose(config)).take() is None


def test_nothing_is_reserved_where_nothing_is_packed(tmp_path):
    folder = save(tmp_path)
    config = ServerConfig(model=str(folder), dtype="bfloat16")
    assert Reservation(folder, choose(config)).take() is None


def test_memory_that_cannot_be_had_ends_the_start(tmp_path, monkeypatch):
    def refuse(shapes):
        raise MemoryError("no room")

    monkeypatch.setattr(reservation, "Packing", refuse)
    folder = save(tmp_path)
    config = ServerConfig(model=str(folder), kv_cache_tokens=1024)
    with pytest.raises(MemoryError, match="no room"):
        load_causal(config, choose(config), Reservation(folder, choose(config)))


@pytest.mark.skipif(not HAS_AVX2, reason="int8 needs AVX2")
def test_room_is_free_once_its_weights_are_replaced(tmp_path, monkeypatch):
    """Without the garbage collector, which a starting server does not run."""
    rooms = []
    fill = Packing.fill

    def noting(self, *arguments):
        if self.precision == "fp32" and not rooms:
            rooms.append(weakref.ref(self))
        fill(self, *arguments)

    monkeypatch.setattr(Packing, "fill", noting)
    folder = save(tmp_path)
    config = ServerConfig(model=str(folder), kv_cache_tokens=1024, quantization="int8")
    gc.disable()
    try:
        held = Reservation(folder, choose(config))
        loaded = load_causal(config, choose(config), held)
        assert loaded.linears[0].packing.precision == "int8"
        assert rooms[0]() is None
    finally:
        gc.enable()


@pytest.fixture(autouse=True)
def threads():
    """Loading sets how many threads torch has."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
