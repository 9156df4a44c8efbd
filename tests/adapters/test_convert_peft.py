"""Adapters of PEFT, against what PEFT's own modules compute."""

import pytest
import torch
from reference import edited
from safetensors.torch import load_file

from redmux.errors import InvalidAdapterError
from redmux_adapters import Adapter, Edit, editable_sites, fingerprint
from redmux_adapters.convert import Options, Target, convert, convert_tensors

peft = pytest.importorskip("peft")
# PEFT warns of its own calls into transformers, and of shapes that it does not know.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
IDS = torch.tensor([[5, 3, 9, 1, 7]])
SMALL = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}  # fmt: skip
GROUPED = {**SMALL, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}
CONFIGS = {
    "llama": GROUPED,
    "gemma": GROUPED,
    "phi3": SMALL,
    "gpt2": {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "opt": {**SMALL, "ffn_dim": 24, "word_embed_proj_dim": 16},
    "roberta": {**SMALL, "type_vocab_size": 1, "num_labels": 3},
    "t5": {"vocab_size": 32, "d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 2, "num_heads": 2},
}


def make(model_type, kind=None, **changes):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **CONFIGS[model_type], **changes)
    torch.manual_seed(0)
    model = (kind or AutoModelForCausalLM).from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms of their own, far from the initial
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def train(model, mark, lowest=0.4):
    """Gives PEFT's own parameters values of trained ones."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if mark in name:
                parameter.copy_(lowest + 1.2 * torch.rand_like(parameter))
    return model.eval()


@torch.no_grad()
def compare(tuned, plain, adapter, read=lambda output: output.logits, **inputs):
    expected = read(tuned(input_ids=IDS, **inputs))
    with edited(plain, adapter.edits):
        given = read(plain(input_ids=IDS, **inputs))
    base = read(plain(input_ids=IDS, **inputs))
    assert (expected - base).abs().max() > 0.01
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4)


def tensors_of(tuned, folder):
    tuned.save_pretrained(folder)
    return load_file(folder / "adapter_model.safetensors")


# The sites that PEFT's default targets become in layer 0.
IA3 = {
    "llama": {"mlp.up_proj", "self_attn.k_proj", "self_attn.v_proj"},
    "gemma": {"mlp.up_proj", "self_attn.q_proj", "self_attn.v_proj"},
    "gpt2": {"attn.c_attn", "mlp.act"},
    "opt": {"fc1", "self_attn.k_proj", "self_attn.q_proj"},
}


@pytest.mark.parametrize("model_type", IA3)
def test_ia3_computes_the_same(model_type, tmp_path):
    plain = make(model_type)
    tuned = peft.get_peft_model(make(model_type), peft.IA3Config(task_type="CAUSAL_LM"))
    tensors = tensors_of(train(tuned, "ia3_l"), tmp_path)
    adapter, kind = convert_tensors(tensors, Target(fingerprint(plain), plain))
    assert kind == "IA3 of PEFT"
    sites = {path.partition(".0.")[2] for path in adapter.sites if ".0." in path}
    assert sites == IA3[model_type]
    assert len(adapter.sites) == 2 * len(sites)
    compare(tuned, plain, adapter)


def test_ia3_of_a_fused_gate_leaves_the_gate_alone(tmp_path):
    plain = make("phi3")
    config = peft.IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"])
    tuned = train(peft.get_peft_model(make("phi3"), config), "ia3_l")
    adapter = convert_tensors(tensors_of(tuned, tmp_path), Target("phi3-16x2-0", plain)).adapter
    scale = adapter.edits["model.layers.0.mlp.gate_up_proj"].scale
    assert len(scale) == 48
    assert scale[:24].tolist() == [1] * 24
    compare(tuned, plain, adapter)


def test_negative_scales_stay_behind_the_relu(tmp_path):
    plain = make("opt")
    tuned = peft.get_peft_model(make("opt"), peft.IA3Config(task_type="CAUSAL_LM"))
    tensors = tensors_of(train(tuned, "ia3_l", lowest=-0.5), tmp_path)
    adapter = convert_tensors(tensors, Target("opt-16x2-0", plain)).adapter
    assert "model.decoder.layers.0.activation_fn" in adapter.sites
    compare(tuned, plain, adapter)


def test_ia3_of_an_encoder_moves_to_the_values_and_keeps_its_head(tmp_path):
    from transformers import AutoModel, AutoModelForSequenceClassification

    whole = make("roberta", AutoModelForSequenceClassification)
    plain = whole.roberta
    tuned = peft.get_peft_model(
        make("roberta", AutoModelForSequenceClassification), peft.IA3Config(task_type="SEQ_CLS")
    )
    train(tuned, "ia3_l")
    tensors_of(tuned, tmp_path)
    assert type(plain) is type(AutoModel.from_config(plain.config))
    target = Target(fingerprint(plain), plain)
    adapter = convert(tmp_path, target, Options(labels=["a", "b", "c"])).adapter
    assert "encoder.layer.0.intermediate" in adapter.sites
    assert "encoder.layer.0.attention.self.value" in adapter.sites
    assert "encoder.layer.0.attention.output.dense" not in adapter.sites
    compare(tuned.base_model.model.roberta, plain, adapter, lambda out: out.last_hidden_state)
    head, classifier = adapter.head, tuned.base_model.model.classifier.modules_to_save.default
    assert head.config.kind == "roberta"
    assert head.config.labels == ("a", "b", "c")
    for name, tensor in classifier.state_dict().items():
        assert torch.equal(head.tensors[name], tensor)


@pytest.mark.parametrize(
    ("changes", "site"),
    [
        ({}, "encoder.block.0.layer.1.DenseReluDense.wi"),
        ({"feed_forward_proj": "gated-gelu"}, "decoder.block.1.layer.2.DenseReluDense.wi_1"),
    ],
)
def test_ia3_of_an_encoder_decoder_computes_the_same(changes, site, tmp_path):
    from transformers import AutoModelForSeq2SeqLM

    plain = make("t5", AutoModelForSeq2SeqLM, **changes)
    config = peft.IA3Config(task_type="SEQ_2_SEQ_LM")
    tuned = peft.get_peft_model(make("t5", AutoModelForSeq2SeqLM, **changes), config)
    tensors = tensors_of(train(tuned, "ia3_l"), tmp_path)
    adapter = convert_tensors(tensors, Target("t5-16x2-0", plain)).adapter
    assert site in adapter.sites
    assert adapter.sites.keys() <= editable_sites(plain).keys()
    compare(tuned, plain, adapter, decoder_input_ids=torch.tensor([[0, 4]]))


def test_input_scales_of_shared_values_are_refused():
    model = make("llama")
    tensors = {"base_model.model.model.layers.0.self_attn.o_proj.ia3_l": torch.ones(1, 16)}
    with pytest.raises(InvalidAdapterError, match="several heads of queries share one of values"):
        convert_tensors(tensors, Target("llama-16x2-0", model))
    tensors = {"base_model.model.model.layers.0.self_attn.k_proj.ia3_l": torch.ones(1, 16)}
    with pytest.raises(InvalidAdapterError, match=r"k_proj', and that is the output of no known m"):
        convert_tensors(tensors, Target("llama-16x2-0", model))


def test_two_scales_that_come_together_have_one_size():
    """One of the outputs of `up_proj`, one of the inputs of `down_proj`, which are the same."""
    start = "base_model.model.model.layers.0.mlp."
    tensors = {
        f"{start}up_proj.ia3_l": torch.ones(24, 1),
        f"{start}down_proj.ia3_l": torch.ones(1, 23),
    }
    target = Target("llama-16x2-0", make("llama"))
    with pytest.raises(
        InvalidAdapterError, match=r"at 'model\.layers\.0\.mlp\.up_proj', of 24 and"
    ):
        convert_tensors(tensors, target)


def test_what_needs_the_base_model_says_so():
    path = "base_model.model.model.layers.0"
    for name, shape in (
        (f"{path}.mlp.down_proj.ia3_l", (1, 24)),
        (f"{path}.input_layernorm.ln_tuning_layers.weight", (16,)),
        ("model.layers.0.mlp.down_proj.bias", (16,)),
    ):
        with pytest.raises(InvalidAdapterError, match="base model at hand; give --base"):
            convert_tensors({name: torch.ones(shape)}, Target("llama-16x2-0"))


def test_beft_computes_the_same(tmp_path):
    if not hasattr(peft, "BeftConfig"):
        pytest.skip("needs a PEFT with BEFT")
    plain = make("llama")
    tuned = peft.get_peft_model(make("llama"), peft.BeftConfig(target_modules=["v_proj"]))
    tensors = tensors_of(train(tuned, "beft_bias"), tmp_path)
    adapter, kind = convert_tensors(tensors, Target("llama-16x2-0", plain))
    assert kind == "BEFT of PEFT"
    assert set(adapter.sites) == {f"model.layers.{i}.self_attn.v_proj" for i in range(2)}
    compare(tuned, plain, adapter)


@pytest.mark.parametrize(("model_type", "site"), [
    ("llama", "model.layers.1.post_attention_layernorm"),
    ("gemma", "model.norm"),
    ("gpt2", "transformer.h.0.ln_1"),
])  # fmt: skip
def test_tuned_norms_compute_the_same(model_type, site, tmp_path):
    plain = make(model_type)
    config = peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=r".*(norm|ln_1|ln_f)")
    tuned = train(peft.get_peft_model(make(model_type), config), "ln_tuning_layers")
    tensors = tensors_of(tuned, tmp_path)
    adapter, kind = convert_tensors(tensors, Target(fingerprint(plain), plain))
    assert kind == "LN tuning of PEFT"
    assert site in adapter.sites
    compare(tuned, plain, adapter)


def test_a_norm_weight_of_zero_cannot_be_brought_back():
    model = make("llama")
    name = "base_model.model.model.norm.ln_tuning_layers.weight"
    target = Target("llama-16x2-0", model)
    with torch.no_grad():
        model.model.norm.weight[3] = 0
    weight = model.model.norm.weight.detach() * 2
    assert convert_tensors({name: weight}, target).adapter.edits["model.norm"].scale[3] == 1
    weight[3] = 1
    with pytest.raises(InvalidAdapterError, match=r"'model\.norm' is 0 at index 3: its output th"):
        convert_tensors({name: weight}, target)


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_trained_biases_become_their_differences(model_type):
    changes = {"attention_bias": True, "mlp_bias": True} if model_type == "llama" else {}
    tuned, plain = make(model_type, **changes), make(model_type, **changes)
    biases = {name: p for name, p in tuned.named_parameters() if name.endswith(".bias")}
    with torch.no_grad():
        for parameter in biases.values():
            parameter.add_(torch.randn_like(parameter))
    untouched = next(iter(biases))
    biases[untouched].data.copy_(plain.get_parameter(untouched).data)
    adapter, kind = convert_tensors(biases, Target(fingerprint(plain), plain))
    assert kind == "trained biases"
    assert len(adapter.sites) == len(biases) - 1
    compare(tuned, plain, adapter)


def test_biases_of_a_model_that_had_none_are_taken_as_they_are():
    model, site = make("llama"), "model.layers.0.mlp.down_proj"
    bias = torch.randn(16)
    adapter = convert_tensors({f"{site}.bias": bias}, Target("llama-16x2-0", model)).adapter
    assert adapter == Adapter("llama-16x2-0", {site: Edit(torch.ones(16), bias)})


@pytest.mark.parametrize(
    ("name", "size", "error"),
    [
        ("lm_head.bias", 32, "'lm_head.bias' is the bias of no linear module or norm"),
        ("transformer.h.0.mlp.c_proj.bias", 8, "has 8 values; the base model's module takes 16"),
        ("transformer.h.0.mlp.c_proj.bias", 16, "biases are those of the base model; nothing to"),
    ],
)
def test_biases_that_are_no_edit_are_refused(name, size, error):
    model = make("gpt2")
    bias = torch.ones(size)
    if size == 16:
        bias = model.get_parameter(name).detach().clone()
    with pytest.raises(InvalidAdapterError, match=error):
        convert_tensors({name: bias}, Target("gpt2-16x2-0", model))
