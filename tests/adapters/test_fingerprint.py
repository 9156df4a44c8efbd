"""What a base fingerprint sees of a model, and what it forgives a copy of it."""

import copy
import itertools
from pathlib import Path

import gguf
import pytest
import torch

import redmux_adapters
from redmux.errors import WrongBaseError
from redmux_adapters import BaseMatch, fingerprint, load_base, match_bases, read_adapter
from redmux_adapters.bases.match import require_base, without_sketch
from redmux_adapters.bases.sketch import NUM_CHARS, NUM_COORDINATES, Digests, Sketch

QUANTIZATIONS = ("Q8_0", "Q5_0", "Q4_1", "Q4_0")
SHAPE = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
    "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0,
}  # fmt: skip
GPT2 = {"vocab_size": 256, "n_embd": 64, "n_layer": 4, "n_head": 2, "n_positions": 64}
T5 = {"vocab_size": 256, "d_model": 64, "d_ff": 128, "d_kv": 32, "num_layers": 4, "num_heads": 2,
      "decoder_start_token_id": 0}  # fmt: skip
KINDS = {
    "llama": (SHAPE, "AutoModelForCausalLM"),
    "gpt2": (GPT2, "AutoModelForCausalLM"),
    "roberta": (SHAPE, "AutoModel"),
    "t5": (T5, "AutoModelForSeq2SeqLM"),
}


def make(model_type="llama", seed=0, **changes):
    import transformers

    options, kind = KINDS[model_type]
    config = transformers.AutoConfig.for_model(model_type, **options | changes)
    torch.manual_seed(seed)
    model = getattr(transformers, kind).from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def changed(model, change, names=("",)):
    """A copy with `change` applied to all parameters with one of `names` in theirs."""
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        if any(part in name for part in names):
            parameter.copy_(change(parameter))
    return model


def quantized(model, kind):
    """What remains of a model's matrices in a GGUF file, whose vectors are kept as they are."""
    kind = gguf.GGMLQuantizationType[kind]

    def change(values):
        if values.dim() < 2 or values.shape[-1] % 32:
            return values
        blocks = gguf.quants.quantize(values.numpy(), kind)
        return torch.tensor(gguf.quants.dequantize(blocks, kind))

    return changed(model, change)


def merged(size):
    """Adds a product of two matrices, as merging a LoRA does, `size` times as large as a weight."""

    def change(weight):
        torch.manual_seed(1)
        low = torch.randn(weight.shape[0], 4) @ torch.randn(4, weight.shape[1])
        return weight + size * low * weight.norm() / low.norm()

    return change


def match(first, second):
    one, other = match_bases(fingerprint(first), fingerprint(second)), None
    other = match_bases(fingerprint(second), fingerprint(first))
    assert one is other, "the order must not matter"
    return one


@pytest.fixture(scope="module", params=sorted(KINDS))
def model(request):
    return make(request.param)


@pytest.fixture(scope="module")
def llama():
    return make()


def test_a_fingerprint_begins_with_architecture_and_size(model):
    name = fingerprint(model)
    model_type = model.config.model_type
    assert name.startswith(f"{model_type}-64x4-")
    assert name.split("-", 4)[3] == "256"
    assert len(name) <= 160
    assert without_sketch(name) == name[: -NUM_CHARS - 1]
    assert without_sketch(without_sketch(name)) == without_sketch(name)


def test_copies_in_other_precisions_are_the_same_base(model, tmp_path):
    bf16, fp16 = (copy.deepcopy(model).to(kind) for kind in (torch.bfloat16, torch.float16))
    model.save_pretrained(tmp_path)
    saved = type(model).from_pretrained(tmp_path)
    assert fingerprint(saved) == fingerprint(model)
    assert [match(model, copy) for copy in (bf16, fp16, bf16.float())] == [BaseMatch.SAME] * 3
    assert match(bf16, copy.deepcopy(bf16).half()) is BaseMatch.SAME


def test_quantised_copies_match_the_original_and_each_other(model):
    copies = [model, copy.deepcopy(model).bfloat16(), *(quantized(model, k) for k in QUANTIZATIONS)]
    for first, second in itertools.combinations(copies[1:], 2):
        assert match(first, second) is BaseMatch.QUANTIZED
    for quantization in copies[2:]:
        assert match(model, quantization) is BaseMatch.QUANTIZED
        assert match(quantization, copy.deepcopy(quantization).bfloat16()) is BaseMatch.SAME


@pytest.mark.parametrize("kind", ["F32", *QUANTIZATIONS])
@pytest.mark.parametrize("names", [("q_proj", "v_proj"), ("gate", "down")])
@pytest.mark.parametrize("size", [0.001, 0.02])
def test_a_merged_lora_makes_another_base(llama, kind, names, size):
    """Of the dequantised weights where those are quantised: what is trained on a GGUF file."""
    base = llama if kind == "F32" else quantized(llama, kind)
    relative = changed(base, merged(size), names)
    assert match(base, relative) is BaseMatch.OTHER
    assert match(base, copy.deepcopy(relative).bfloat16()) is BaseMatch.OTHER


def test_training_all_weights_makes_another_base(llama):
    for base in (llama, copy.deepcopy(llama).bfloat16().float(), quantized(llama, "Q4_1")):
        noisy = changed(base, lambda w: w + 0.003 * w.std() * torch.randn_like(w))
        assert match(base, noisy) is BaseMatch.OTHER
        assert match(base, noisy.bfloat16()) is BaseMatch.OTHER


def test_vectors_moved_by_a_thousandth_make_another_base(model):
    for base in (model, copy.deepcopy(model).bfloat16().float(), quantized(model, "Q8_0")):
        moved = changed(base, lambda w: w * 1.001 if w.dim() == 1 else w)
        assert match(base, moved) is BaseMatch.OTHER


def test_two_added_tokens_make_another_base(llama):
    larger = copy.deepcopy(llama)
    larger.resize_token_embeddings(258)
    assert match(llama, larger) is BaseMatch.OTHER
    with pytest.raises(WrongBaseError, match="258 and 256 token ids"):
        require_base(fingerprint(larger), fingerprint(llama))


def test_another_model_of_the_same_sizes_is_no_quantisation(model):
    other = make(model.config.model_type, seed=1)
    for kind in QUANTIZATIONS:
        same_vectors = quantized(other, kind)
        ours = dict(model.named_parameters())
        for name, parameter in same_vectors.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(ours[name])
        assert match(model, same_vectors) is BaseMatch.OTHER


def test_an_output_head_that_is_tied_in_one_copy_only_changes_nothing():
    tied = make(tie_word_embeddings=True)
    untied = make(tie_word_embeddings=False)
    untied.load_state_dict(tied.state_dict())
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight
    assert fingerprint(untied) == fingerprint(tied)


def test_another_architecture_or_size_is_foreign(llama):
    ours = fingerprint(llama)
    for other in (make("gpt2"), make(num_hidden_layers=3), make(hidden_size=32)):
        assert match_bases(fingerprint(other), ours) is BaseMatch.FOREIGN
        with pytest.raises(WrongBaseError, match="another architecture or size; train"):
            require_base(fingerprint(other), ours, allow_other=True)
    assert match_bases("whatever", ours) is BaseMatch.FOREIGN


def test_a_fingerprint_of_vectors_alone_is_unverified(llama):
    """As files have it that were made before fingerprints saw matrices."""
    ours = fingerprint(llama)
    old = "-".join(ours.split("-")[:3])
    assert require_base(old, ours) is BaseMatch.UNVERIFIED
    assert match_bases(old, old) is BaseMatch.SAME
    moved = fingerprint(changed(llama, lambda w: w + 0.1, ["norm"]))
    assert match_bases(old, moved) is BaseMatch.OTHER


def test_other_weights_are_refused_unless_they_are_allowed(llama):
    relative = fingerprint(changed(llama, merged(0.02), ["q_proj"]))
    with pytest.raises(WrongBaseError, match=r"fine-tuned relatives have; .*--allow-other-base"):
        require_base(relative, fingerprint(llama))
    assert require_base(relative, fingerprint(llama), allow_other=True) is BaseMatch.OTHER


def test_the_text_of_a_sketch_holds_all_of_it():
    coordinates = tuple(index / 512 for index in range(-12, NUM_COORDINATES - 12))
    sketch = Sketch(Digests(1, 2**26 - 1, 3), Digests(4, 5, 6), True, 25 / 4096, coordinates)
    assert len(sketch.text()) == NUM_CHARS
    assert Sketch.parse(sketch.text()) == sketch
    clipped = sketch._replace(repeats=0.9, projections=(9.0, -9.0, *coordinates[2:]))
    assert Sketch.parse(clipped.text()).projections[:2] == (2047 / 512, -4.0)


@pytest.mark.model
def test_the_bundled_adapters_are_for_the_default_model():
    zoo = Path(redmux_adapters.__file__).parent / "zoo"
    made_for = {read_adapter(path.parent).base_fingerprint for path in zoo.glob("*/*.json")}
    for kind in (torch.float32, torch.bfloat16):
        ours = fingerprint(load_base("smollm2", kind)[0])
        assert {match_bases(theirs, ours) for theirs in made_for} == {BaseMatch.SAME}
