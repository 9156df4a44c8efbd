import pytest
import torch
from torch import nn

from redmux.errors import InvalidArgumentError
from redmux_adapters import Adapter, editable_sites, ffn_sites, fingerprint

HIDDEN, LAYERS = 16, 2
LLAMA = {
    "vocab_size": 32,
    "hidden_size": HIDDEN,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
PLAIN = {key: LLAMA[key] for key in LLAMA if key not in ("num_key_value_heads", "head_dim")}
GPT2 = {"vocab_size": 32, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 2, "n_positions": 64}
OPT = {**PLAIN, "ffn_dim": 24, "word_embed_proj_dim": HIDDEN}
DOWN = "model.layers.{}.mlp.down_proj"

# architecture: configuration, path of the FFN output, linear modules in a layer, their outputs
FAMILIES = {
    "gemma": (LLAMA, DOWN, 7),
    "gemma2": (LLAMA, DOWN, 7),
    "gemma3_text": (LLAMA, DOWN, 7),
    "gpt2": (GPT2, "transformer.h.{}.mlp.c_proj", 4),
    "gpt_neox": (PLAIN, "gpt_neox.layers.{}.mlp.dense_4h_to_h", 4),
    "granite": (LLAMA, DOWN, 7),
    "llama": (LLAMA, DOWN, 7),
    "mistral": (LLAMA, DOWN, 7),
    "olmo2": (LLAMA, DOWN, 7),
    "opt": (OPT, "model.decoder.layers.{}.fc2", 6),
    "phi": (PLAIN, "model.layers.{}.mlp.fc2", 6),
    "phi3": (LLAMA, DOWN, 4),
    "qwen2": (LLAMA, DOWN, 7),
    "qwen3": (LLAMA, DOWN, 7),
    "smollm3": (LLAMA, DOWN, 7),
}


def tiny(model_type, **changes):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **{**FAMILIES[model_type][0], **changes})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request):
    return request.param, tiny(request.param)


def test_ffn_sites_are_the_output_projections(family):
    model_type, model = family
    path = FAMILIES[model_type][1]
    assert ffn_sites(model) == {path.format(layer): HIDDEN for layer in range(LAYERS)}


def test_editable_sites_are_all_linears_of_the_layers_and_no_others(family):
    model_type, model = family
    sites = editable_sites(model)
    assert len(sites) == LAYERS * FAMILIES[model_type][2]
    assert set(ffn_sites(model)) <= set(sites)
    layers = FAMILIES[model_type][1].partition("{}")[0]
    linear = {
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    }
    assert linear - set(sites) <= {"lm_head", "embed_out"}
    assert all(path.startswith(layers) for path in sites)


def test_sizes_are_what_the_modules_put_out(family):
    _, model = family
    outputs = {}
    for path, _ in editable_sites(model).items():

        def record(module, inputs, output, path=path):
            outputs[path] = output.shape[-1]

        model.get_submodule(path).register_forward_hook(record)
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))
    assert outputs == editable_sites(model)


def test_fingerprint_names_architecture_and_shape(family):
    model_type, model = family
    assert fingerprint(model).startswith(f"{model_type}-{HIDDEN}x{LAYERS}-")
    assert len(fingerprint(model).rpartition("-")[2]) == 16
    assert Adapter.identity(model).base_fingerprint == fingerprint(model)


def test_fingerprint_survives_bf16_and_saving(tmp_path):
    model = tiny("llama")
    expected = fingerprint(model)
    model.save_pretrained(tmp_path)
    from transformers import AutoModelForCausalLM

    assert fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path)) == expected
    assert fingerprint(model.bfloat16()) == expected


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.input_layernorm.weight"])
def test_fingerprint_changes_with_a_norm_weight(name):
    model = tiny("llama")
    before = fingerprint(model)
    with torch.no_grad():
        model.get_parameter(name)[3] = 1.0078125  # the next bf16 after 1
    assert fingerprint(model) != before


def test_fingerprint_changes_with_a_bias_and_with_the_shape():
    model = tiny("gpt2")
    before = fingerprint(model)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.bias[0] = 0.5
    assert fingerprint(model) != before
    assert fingerprint(tiny("llama")) != fingerprint(tiny("llama", num_hidden_layers=1))


def test_fingerprint_ignores_matrices():
    model = tiny("llama")
    before = fingerprint(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    assert fingerprint(model) == before


def test_identity_of_a_model_edits_its_ffn_outputs():
    model = tiny("gpt2")
    assert Adapter.identity(model).sites == ffn_sites(model)
    assert Adapter.identity(model, "other").base_fingerprint == "other"


def test_the_paper_s_site_of_an_unknown_architecture_is_refused_by_name():
    model = tiny("llama")
    model.config.model_type = "mamba"
    with pytest.raises(InvalidArgumentError, match="'mamba' models are not known; known are"):
        ffn_sites(model)


def test_editable_sites_need_no_knowledge_of_the_architecture():
    model = tiny("llama")
    known = editable_sites(model)
    model.config.model_type = "mamba"
    assert editable_sites(model) == known


def test_a_model_without_one_list_of_layers_is_refused():
    model = tiny("llama")
    model.config.num_hidden_layers = 77
    with pytest.raises(InvalidArgumentError, match="0 lists of 77 modules"):
        editable_sites(model)


@pytest.mark.model
def test_fingerprint_of_the_default_model_is_the_documented_one():
    from redmux_adapters import load_base

    expected = "llama-576x30-a8f2e13b0085c44d"
    assert fingerprint(load_base("smollm2")[0]) == expected
    assert fingerprint(load_base("smollm2", torch.bfloat16)[0]) == expected
