import re

import pytest
import torch
from torch import nn

from redmux.errors import InvalidArgumentError
from redmux_adapters import (
    Adapter,
    addressable_sites,
    editable_sites,
    ffn_sites,
    fingerprint,
    linear_sites,
    with_layer_norms,
)
from redmux_adapters.bases.sites import POSITIONS, red_sites

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
BERT = {**PLAIN, "type_vocab_size": 1}
DISTILBERT = {"vocab_size": 32, "dim": HIDDEN, "hidden_dim": 24, "n_layers": LAYERS, "n_heads": 2}
T5 = {"vocab_size": 32, "d_model": HIDDEN, "d_ff": 24, "d_kv": 8, "num_layers": LAYERS,
      "num_heads": 2, "pad_token_id": 0, "decoder_start_token_id": 0}  # fmt: skip
OUTPUT = "encoder.layer.{}.output.dense"

# architecture: configuration, path of the FFN output, linear modules in a layer, their outputs
FAMILIES = {
    "bert": (BERT, OUTPUT, 6),
    "electra": (BERT | {"embedding_size": 8}, OUTPUT, 6),
    "distilbert": (DISTILBERT, "transformer.layer.{}.ffn.lin2", 6),
    "gemma": (LLAMA, DOWN, 7),
    "gemma2": (LLAMA, DOWN, 7),
    "gemma3_text": (LLAMA, DOWN, 7),
    "gpt2": (GPT2, "transformer.h.{}.mlp.c_proj", 4),
    "gpt_neox": (PLAIN, "gpt_neox.layers.{}.mlp.dense_4h_to_h", 4),
    "granite": (LLAMA, DOWN, 7),
    "llama": (LLAMA, DOWN, 7),
    "mistral": (LLAMA, DOWN, 7),
    "mpnet": (PLAIN, OUTPUT, 6),
    "olmo2": (LLAMA, DOWN, 7),
    "opt": (OPT, "model.decoder.layers.{}.fc2", 6),
    "phi": (PLAIN, "model.layers.{}.mlp.fc2", 6),
    "phi3": (LLAMA, DOWN, 4),
    "qwen2": (LLAMA, DOWN, 7),
    "qwen3": (LLAMA, DOWN, 7),
    "roberta": (BERT, OUTPUT, 6),
    "smollm3": (LLAMA, DOWN, 7),
    "xlm-roberta": (BERT, OUTPUT, 6),
}
ENCODERS = {"bert", "distilbert", "electra", "mpnet", "roberta", "xlm-roberta"}


def tiny(model_type, **changes):
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    options = FAMILIES[model_type][0] if model_type in FAMILIES else LLAMA
    config = AutoConfig.for_model(model_type, **{**options, **changes})
    torch.manual_seed(0)
    kind = AutoModel if model_type in ENCODERS else AutoModelForCausalLM
    return kind.from_config(config).eval()


def tiny_t5(model_type="t5", **changes):
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    torch.manual_seed(0)
    return AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(model_type, **T5, **changes))


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request):
    return request.param, tiny(request.param)


def test_ffn_sites_are_the_output_projections(family):
    model_type, model = family
    path = FAMILIES[model_type][1]
    assert ffn_sites(model) == {path.format(layer): HIDDEN for layer in range(LAYERS)}


def test_linear_sites_are_all_linears_of_the_layers_and_no_others(family):
    model_type, model = family
    sites = linear_sites(model)
    assert len(sites) == LAYERS * FAMILIES[model_type][2]
    assert set(ffn_sites(model)) <= set(sites)
    layers = FAMILIES[model_type][1].partition("{}")[0]
    linear = {
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    }
    assert linear - set(sites) <= {
        "lm_head", "embed_out", "embeddings_project", "pooler.dense"
    }  # fmt: skip
    assert all(path.startswith(layers) for path in sites)


def put_out(model, sites, **inputs):
    """The sizes of what the modules put out in a forward pass, of a tuple the first."""
    outputs = {}
    for path in sites:

        def record(module, inputs, output, path=path):
            outputs[path] = (output[0] if isinstance(output, tuple) else output).shape[-1]

        model.get_submodule(path).register_forward_hook(record)
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]), **inputs)
    return outputs


def test_sizes_are_what_the_modules_put_out(family):
    model_type, _ = family
    model = tiny(model_type)
    sites = addressable_sites(model)
    assert sites.items() > editable_sites(model).items()
    assert put_out(model, sites) == sites


def test_every_position_is_editable_and_nothing_else_but_linears(family):
    _, model = family
    editable = editable_sites(model)
    assert editable.items() <= addressable_sites(model).items()
    found = linear_sites(model)
    for position in POSITIONS:
        try:
            sites = red_sites(model, position)
        except InvalidArgumentError:
            assert position == "res_with_attn"
        else:
            assert sites.items() <= editable.items()
            found |= sites
    assert found == editable


def test_a_layer_norm_has_the_size_of_its_site():
    assert with_layer_norms({"a.b": 3}) == {"a.b": 3, "a.b.activation_ln": 3}


# What the regular expressions of the authors' model.py match in RoBERTa, GPT-2 and T5.
AUTHORS = {
    ("roberta", "ffn"): r"\d+\.output.dense",
    ("roberta", "ffn_attn"): r".output.dense",
    ("roberta", "attn"): r"[^\d].output.dense",
    ("roberta", "res"): r"\d+\.output$",
    ("roberta", "res_with_attn"): r".output$",
    ("roberta", "more"): r".output.dense|key|query|value",
    ("gpt2", "ffn"): r"mlp.c_proj",
    ("gpt2", "more"): r"c_attn|c_proj",
    ("llama", "ffn"): r"down_proj",
}


@pytest.mark.parametrize(("model_type", "position"), AUTHORS)
def test_positions_are_those_of_the_authors_code(model_type, position):
    model = tiny(model_type)
    pattern = AUTHORS[model_type, position]
    matched = {path for path, _ in model.named_modules() if re.search(pattern, path)}
    assert set(red_sites(model, position)) == matched


@pytest.mark.parametrize("excluded", [[0], [1, 2], []])
def test_excluded_layers_are_those_of_the_authors_code(excluded):
    model = tiny("roberta", num_hidden_layers=12)
    none = re.compile("|".join(rf"\b{layer}\b" for layer in excluded) or "(?!)")
    matched = {p for p, _ in model.named_modules() if re.search(r".output.dense", p)}
    matched = {path for path in matched if not none.search(path)}
    assert set(red_sites(model, "ffn_attn", exclude=excluded)) == matched
    chosen = set(range(12)) - set(excluded)
    assert red_sites(model, "ffn_attn", layers=chosen).keys() == matched


@pytest.mark.parametrize("changes", [{}, {"feed_forward_proj": "gated-gelu"}])
def test_encoder_decoders_have_the_sites_of_both_stacks(changes):
    model = tiny_t5(**changes)
    assert set(red_sites(model, "ffn")) == {p for p, _ in model.named_modules() if "wo" in p}
    assert len(linear_sites(model)) == LAYERS * (4 + 8) + LAYERS * 2 * (3 if changes else 2)
    sites = addressable_sites(model)
    assert put_out(model, sites, decoder_input_ids=torch.tensor([[0, 1]])) == sites
    assert red_sites(model, "res_with_attn").items() <= sites.items()
    assert len(red_sites(model, "res_with_attn")) == LAYERS * 5
    assert list(red_sites(model, "ffn", layers=[1])) == [
        "encoder.block.1.layer.1.DenseReluDense.wo",
        "decoder.block.1.layer.2.DenseReluDense.wo",
    ]


# Millions of parameters as the paper gives them.
PAPER = [
    ("roberta", {}, "ffn", 0.02),
    ("roberta", {}, "more", 0.09),
    ("roberta", {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
                 "intermediate_size": 4096}, "ffn", 0.05),
    ("gpt2", {"n_embd": 1024, "n_layer": 24, "n_head": 16}, "ffn", 0.05),
    ("t5", {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}, "ffn", 0.04),
    ("llama", {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 11008},
     "ffn", 0.26),
]  # fmt: skip


@pytest.mark.parametrize(("model_type", "sizes", "position", "millions"), PAPER)
def test_parameter_counts_are_the_paper_s(model_type, sizes, position, millions):
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    kinds = {"roberta": AutoModel, "t5": AutoModelForSeq2SeqLM}
    config = AutoConfig.for_model(model_type, **sizes)
    with torch.device("meta"):
        model = kinds.get(model_type, AutoModelForCausalLM).from_config(config)
    adapter = Adapter.identity(red_sites(model, position), "any")
    assert round(adapter.num_parameters / 1e6, 2) == millions


def test_sums_that_are_no_module_s_output_are_refused():
    with pytest.raises(InvalidArgumentError, match=r"'llama' models is no module's output.*'res'"):
        red_sites(tiny("llama"), "res_with_attn")


def test_impossible_choices_are_refused():
    model = tiny("llama")
    with pytest.raises(InvalidArgumentError, match="no layer 2; the model has layers 0 to 1"):
        red_sites(model, layers=[0, 2])
    with pytest.raises(InvalidArgumentError, match="no layer is left"):
        red_sites(model, layers=[0], exclude=[0])
    with pytest.raises(InvalidArgumentError, match="no position 'mlp'; known are ffn, attn"):
        red_sites(model, "mlp")
    model.config.model_type = "roberta"
    with pytest.raises(InvalidArgumentError, match=r"has no 'encoder\.layer'; load encoders with"):
        red_sites(model)


def test_identity_of_a_model_edits_its_ffn_outputs():
    model = tiny("gpt2")
    assert Adapter.identity(model).sites == ffn_sites(model)
    assert Adapter.identity(model).base_fingerprint == fingerprint(model)
    assert Adapter.identity(model, "other").base_fingerprint == "other"


def test_the_paper_s_site_of_an_unknown_architecture_is_refused_by_name():
    model = tiny("llama")
    model.config.model_type = "mamba"
    with pytest.raises(InvalidArgumentError, match="'mamba' models are not known; known are"):
        ffn_sites(model)


def test_editable_sites_need_no_knowledge_of_the_architecture():
    model = tiny("llama")
    known = linear_sites(model)
    model.config.model_type = "mamba"
    assert editable_sites(model) == linear_sites(model) == known


def test_a_linear_that_puts_out_a_tuple_is_no_site():
    """Phi-MoE's router is a subclass of nn.Linear with a forward of its own."""
    model = tiny("phimoe")
    routers = [path for path, _ in model.named_modules() if path.endswith(".router")]
    assert len(routers) == LAYERS
    assert not set(routers) & set(editable_sites(model))
    assert "model.layers.0.self_attn.o_proj" in editable_sites(model)


def test_a_model_without_one_list_of_layers_is_refused():
    model = tiny("llama")
    model.config.model_type, model.config.num_hidden_layers = "mamba", 77
    with pytest.raises(InvalidArgumentError, match="0 lists of 77 modules"):
        editable_sites(model)
