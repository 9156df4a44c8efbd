"""Folded models, against the plain model with the edits applied by hand."""

import pytest
import torch
import torch.nn.functional as F
from reference import edited, generate

from redmux.errors import InvalidAdapterError, WrongBaseError
from redmux_adapters import (
    Adapter,
    Edit,
    Head,
    HeadConfig,
    cli,
    fingerprint,
    red_sites,
    write_folder,
)
from redmux_adapters.bases.load_any import load_any
from redmux_adapters.bases.sites import addressable_sites, with_layer_norms
from redmux_adapters.fold import fold

SIZES = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 128}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
CONFIGS = {
    "bert": {**SIZES, "type_vocab_size": 1},
    "distilbert": {"vocab_size": 260, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    "gemma": {**GROUPED, "tie_word_embeddings": False},
    "electra": {**SIZES, "type_vocab_size": 1, "embedding_size": 16},
    "gpt2": {"vocab_size": 260, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gpt_neox": SIZES,
    "granite": GROUPED,
    "llama": GROUPED,
    "mistral": GROUPED,
    "mpnet": SIZES,
    "olmo2": GROUPED,
    "opt": {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi": SIZES,
    "phi3": {**SIZES, "pad_token_id": 0},
    "qwen2": GROUPED,
    "qwen3": GROUPED,
    "roberta": {**SIZES, "type_vocab_size": 1},
    "smollm3": GROUPED,
    "t5": {"vocab_size": 260, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2,
           "num_heads": 4, "decoder_start_token_id": 0, "pad_token_id": 0},
}  # fmt: skip
ENCODERS = ("bert", "distilbert", "electra", "mpnet", "roberta")
PROMPT = [5, 30, 9, 100, 7, 7, 201]


def make(model_type, **changes):
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    kind = AutoModel if model_type in ENCODERS else AutoModelForCausalLM
    kind = AutoModelForSeq2SeqLM if model_type == "t5" else kind
    torch.manual_seed(0)
    model = kind.from_config(AutoConfig.for_model(model_type, **CONFIGS[model_type], **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def random_edits(sites, with_bias=True):
    torch.manual_seed(1)
    return {
        site: Edit(1 + 0.4 * torch.randn(dim), with_bias * 0.3 * torch.randn(dim))
        for site, dim in sites.items()
    }


def adapter_for(model, sites, with_bias=True, **changes):
    return Adapter(fingerprint(model), random_edits(sites, with_bias), **changes)


def through_disk(model, folder):
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, output_loading_info=True)


def check_folded(model_type, adapter, folder):
    """Compares greedy tokens, or the hidden states of an encoder, and what is saved."""
    folded, loading = through_disk(fold(adapter, make(model_type)), folder)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    plain = make(model_type)
    ids = torch.tensor([PROMPT])
    if model_type in ENCODERS:
        with edited(plain, adapter.edits):
            expected = plain(ids).last_hidden_state
        given = folded(ids).last_hidden_state
        assert (expected - plain(ids).last_hidden_state).abs().max() > 0.01
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4)
    elif model_type == "t5":
        with edited(plain, adapter.edits):
            expected = plain.generate(ids, max_new_tokens=12, do_sample=False)
        assert torch.equal(folded.generate(ids, max_new_tokens=12, do_sample=False), expected)
        assert not torch.equal(plain.generate(ids, max_new_tokens=12, do_sample=False), expected)
    else:
        expected, logprobs = generate(plain, PROMPT, 12, adapter.edits)
        tokens, folded_logprobs = generate(folded, PROMPT, 12)
        assert tokens == expected
        assert tokens != generate(plain, PROMPT, 12)[0]
        assert folded_logprobs == pytest.approx(logprobs, abs=1e-3)


@pytest.mark.parametrize(
    ("model_type", "position"),
    [
        *((name, "more") for name in ENCODERS),
        *((name, "res_with_attn") for name in ENCODERS),
        *((name, "more") for name in ("gpt2", "gpt_neox", "granite", "llama", "opt", "phi")),
        ("llama", "ffn"),
        ("llama", "attn"),
        *((name, "attn") for name in ("gemma", "olmo2", "qwen3")),
        ("smollm3", "more"),
    ],
)
def test_folded_models_answer_as_the_edited_ones(model_type, position, tmp_path):
    model = make(model_type)
    check_folded(model_type, adapter_for(model, red_sites(model, position)), tmp_path)


@pytest.mark.parametrize("model_type", ["gemma", "mistral", "qwen2", "t5"])
def test_scales_fold_where_no_bias_can(model_type, tmp_path):
    model = make(model_type)
    sites = red_sites(model, "more")
    check_folded(model_type, adapter_for(model, sites, with_bias=False), tmp_path)


@pytest.mark.parametrize("model_type", ["gemma", "gpt2", "roberta"])
def test_norms_activations_and_the_blocks_around_them_fold(model_type, tmp_path):
    model = make(model_type)
    sites = {
        path: dim
        for path, dim in addressable_sites(model).items()
        if path.endswith(
            ("norm", "ln_1", "LayerNorm", "mlp.act", "intermediate", "c_proj", "output")
        )
    }
    assert len(sites) > 3
    check_folded(model_type, adapter_for(model, sites, model_type != "gemma"), tmp_path)


@pytest.mark.parametrize(
    ("model_type", "position", "error"),
    [
        ("mistral", "ffn", r"'model\.layers\.0\.mlp\.down_proj' can have no bias in the 'mistral'"),
        ("qwen2", "attn", "can have no bias in the 'qwen2' models of transformers"),
        *((name, "ffn", "can have no bias") for name in ("gemma", "olmo2", "phi3", "qwen3")),
        ("t5", "ffn", "can have no bias"),
        ("llama", "res", r"'model\.layers\.0' puts out the residual stream itself"),
    ],
)
def test_edits_without_a_place_are_refused(model_type, position, error):
    model = make(model_type)
    adapter = adapter_for(model, red_sites(model, position))
    with pytest.raises(InvalidAdapterError, match=error):
        fold(adapter, model)


def test_a_layer_norm_behind_an_edit_is_refused():
    model = make("roberta")
    adapter = adapter_for(model, with_layer_norms(red_sites(model, "ffn")))
    with pytest.raises(InvalidAdapterError, match="is a LayerNorm behind an edit, whose mean and"):
        fold(adapter, model)


def test_adapters_of_other_models_are_refused():
    adapter = adapter_for(make("gpt2"), red_sites(make("gpt2")))
    with pytest.raises(WrongBaseError, match="the adapter was made for base 'gpt2-32x2-"):
        fold(adapter, make("llama"))


def head_for(kind, labels):
    sizes = {"roberta": ("dense", "out_proj"), "electra": ("dense", "out_proj"),
             "distilbert": ("pre_classifier", "classifier"),
             "bert": ("", "classifier")}  # fmt: skip
    hidden, output = sizes[kind]
    tensors = {f"{output}.weight": torch.randn(len(labels), 32),
               f"{output}.bias": torch.randn(len(labels))}  # fmt: skip
    if hidden:
        tensors |= {f"{hidden}.weight": torch.randn(32, 32), f"{hidden}.bias": torch.randn(32)}
    return Head(HeadConfig(kind, labels, "single_label_classification"), tensors)


def logits_by_hand(kind, model, head, ids):
    output, t = model(ids), head.tensors
    first = output.last_hidden_state[:, 0]
    if kind in ("roberta", "electra"):
        activation = F.gelu if kind == "electra" else torch.tanh
        first = activation(first @ t["dense.weight"].T + t["dense.bias"])
        return first @ t["out_proj.weight"].T + t["out_proj.bias"]
    if kind == "distilbert":
        first = torch.relu(first @ t["pre_classifier.weight"].T + t["pre_classifier.bias"])
    else:
        first = output.pooler_output
    return first @ t["classifier.weight"].T + t["classifier.bias"]


@pytest.mark.parametrize(
    ("model_type", "kind"),
    [
        ("roberta", "roberta"),
        ("mpnet", "roberta"),
        ("distilbert", "distilbert"),
        ("bert", "bert"),
        ("electra", "electra"),
    ],
)
def test_heads_become_models_for_sequence_classification(model_type, kind, tmp_path):
    model, ids = make(model_type), torch.tensor([PROMPT])
    adapter = adapter_for(model, red_sites(model), head=head_for(kind, ("no", "yes", "maybe")))
    with edited(model, adapter.edits):
        expected = logits_by_hand(kind, model, adapter.head, ids)
    folded, loading = through_disk(fold(adapter, model), tmp_path)
    assert not loading["missing_keys"]
    torch.testing.assert_close(folded(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert folded.config.id2label == {0: "no", 1: "yes", 2: "maybe"}


def test_heads_of_another_architecture_are_refused():
    model = make("bert")
    adapter = adapter_for(model, red_sites(model), head=head_for("roberta", ("a", "b")))
    with pytest.raises(InvalidAdapterError, match="'bert' models of transformers have no head of"):
        fold(adapter, model)


def test_fold_writes_a_folder_that_transformers_generates_from(base, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    adapter = base.adapter(3)
    write_folder(adapter, tmp_path / "adapter")
    arguments = ["--base", str(base.folder), "--output", str(tmp_path / "model")]
    assert cli.main(["fold", str(tmp_path / "adapter"), *arguments]) == 0
    assert capsys.readouterr().out.startswith("LlamaForCausalLM with sha256:")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    folded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = tokenizer("Once upon a time")["input_ids"]
    expected, _ = generate(base.model, ids, 16, adapter.edits)
    assert generate(folded, ids, 16)[0] == expected
    assert generate(base.model, ids, 16)[0] != expected


@pytest.mark.parametrize("model_type", ["roberta", "t5", "llama"])
def test_models_of_every_kind_are_loaded_for_their_adapters(model_type, tmp_path):
    model = make(model_type)
    model.save_pretrained(tmp_path)
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    loaded = load_any(str(tmp_path))
    assert type(loaded) is type(model)
    assert fingerprint(loaded) == fingerprint(model)
