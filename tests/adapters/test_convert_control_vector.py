"""Control vectors, against a hook that adds them to the output of whole layers."""

import pytest
import torch

from redmux.errors import InvalidAdapterError
from redmux_adapters.convert import Options, Target, convert, convert_tensors

SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4,
         "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
         "max_position_embeddings": 64}  # fmt: skip
GPT2 = {"vocab_size": 32, "n_embd": 16, "n_layer": 4, "n_head": 2, "n_positions": 64}
LAYERS = {
    "gemma": "model.layers", "gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers",
    "llama": "model.layers", "mistral": "model.layers", "phi": "model.layers",
    "phi3": "model.layers", "qwen2": "model.layers", "qwen3": "model.layers",
    "smollm3": "model.layers",
}  # fmt: skip
DIRECTIONS = {f"direction.{layer}": torch.randn(16) for layer in (1, 3)}


def write_gguf(path, directions, dtype=None):
    """As repeng's ControlVector.export_gguf does."""
    import gguf

    writer = gguf.GGUFWriter(str(path), "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_uint32("controlvector.layer_count", len(directions))
    for name, vector in directions.items():
        writer.add_tensor(name, vector.numpy(), raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("model_type", LAYERS)
def test_control_vectors_are_added_to_the_residual_stream(model_type):
    from reference import edited
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **(GPT2 if model_type == "gpt2" else SIZES))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    target = Target(f"{model_type}-16x4-0", model)
    adapter, kind = convert_tensors(DIRECTIONS, target, Options(strength=-1.5))
    assert kind == "control vector"
    ids = torch.tensor([[5, 3, 9, 1]])

    def add(vector):
        def hook(module, args, output):
            if isinstance(output, tuple):
                return (output[0] - 1.5 * vector, *output[1:])
            return output - 1.5 * vector

        return hook

    with torch.no_grad():
        with edited(model, adapter.edits):
            given = model(ids).logits
        plain = model(ids).logits
        for name, vector in DIRECTIONS.items():
            layer = model.get_submodule(f"{LAYERS[model_type]}.{name.partition('.')[2]}")
            layer.register_forward_hook(add(vector))
        expected = model(ids).logits
    assert (plain - expected).abs().max() > 0.01
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)


def test_gguf_files_are_read_in_isolation(tmp_path):
    path = write_gguf(tmp_path / "v.gguf", DIRECTIONS)
    adapter = convert(path, Target("llama-16x4-0")).adapter
    assert set(adapter.sites) == {f"model.layers.{i}.mlp.down_proj" for i in (1, 3)}
    for name, vector in DIRECTIONS.items():
        edit = adapter.edits[f"model.layers.{name.partition('.')[2]}.mlp.down_proj"]
        assert torch.equal(edit.bias, vector)
        assert edit.scale.tolist() == [1] * 16


def test_quantised_and_foreign_gguf_files_are_refused(tmp_path):
    import gguf

    from redmux_adapters.convert.worker import read_tensors

    name = str(write_gguf(tmp_path / "f16.gguf", {"a.weight": torch.ones(4, 2).half()}))
    tensors = read_tensors(name)
    assert tensors["a.weight"].shape == (4, 2)
    with pytest.raises(InvalidAdapterError, match=r"unexpected entry 'a\.weight'; known are"):
        convert_tensors(tensors, Target("llama-16x4-0"))
    packed = {"direction.1": torch.zeros(34, dtype=torch.uint8)}
    q8 = write_gguf(tmp_path / "q8.gguf", packed, gguf.GGMLQuantizationType.Q8_0)
    with pytest.raises(InvalidAdapterError, match=r"'direction\.1' is of type Q8_0; allowed are"):
        read_tensors(str(q8))


@pytest.mark.parametrize("model_type", ["gemma2", "granite", "olmo2", "opt", "roberta", "t5"])
def test_models_that_norm_or_weigh_the_ffn_output_are_refused(model_type):
    with pytest.raises(InvalidAdapterError, match=f"no edit of '{model_type}' models: between"):
        convert_tensors(DIRECTIONS, Target(f"{model_type}-16x4-0"))


def test_strength_is_for_control_vectors():
    tensors = {"base_model.model.m.beft_bias": torch.ones(4)}
    with pytest.raises(InvalidAdapterError, match="only control vectors have a strength"):
        convert_tensors(tensors, Target("llama-16x4-0"), Options(strength=2))


def test_layers_that_the_model_lacks_are_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(**GPT2))
    with pytest.raises(InvalidAdapterError, match=r"no editable module 'transformer\.h\.9\.mlp"):
        convert_tensors({"direction.9": torch.ones(16)}, Target("gpt2-16x4-0", model))
    with pytest.raises(InvalidAdapterError, match=r"shape \[1, 16\]; it has to be \[hidden size\]"):
        convert_tensors({"direction.1": torch.ones(1, 16)}, Target("gpt2-16x4-0", model))
