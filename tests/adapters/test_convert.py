import os
import subprocess
import sys
import zipfile

import pytest
import torch
from official import official
from reference import edited

from redmux.errors import InvalidAdapterError
from redmux_adapters import red_sites
from redmux_adapters.convert import Options, Target, convert, convert_tensors
from redmux_adapters.convert.delta_vector import read_delta_vector
from redmux_adapters.convert.worker import check_archive, read_tensors

SCALE, BIAS = ".delta_vector.activation_scaling", ".delta_vector.activation_bias"
BASE = "gpt2-4x1-0"


def adapter_of(path, **options):
    return convert(path, Target(BASE), Options(**options)).adapter


@pytest.fixture(autouse=True)
def sparse_checks_as_before():
    """read_tensors switches them on, for its own process as it thinks."""
    yield
    torch.sparse.check_sparse_tensor_invariants.disable()


def write(path, content, **options):
    torch.save(content, path, **options)
    return str(path)


# Name, architecture, position, parameters, and the millions that the paper gives
# (arXiv 2402.15179), where it does.
OFFICIAL_FILES = [
    ("roberta-base-qnli", "roberta", "ffn", 18_432, 0.02),
    ("roberta-base-qnli-redpp", "roberta", "more", 92_160, 0.09),
    ("gpt2-medium-e2e", "gpt2", "ffn", 49_152, 0.05),
    ("gpt2-medium-e2e-redpp", "gpt2", "more", 245_760, None),
    ("llama2-7b", "llama", "ffn", 262_144, 0.26),
    ("t5-base-qnli", "t5", "ffn", 36_864, 0.04),
]
SIZES = {
    "gpt2": {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "llama": {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 11008},
    "t5": {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
}


def model_of(model_type):
    """The authors' base model, without weights."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    kinds = {"roberta": AutoModel, "t5": AutoModelForSeq2SeqLM}
    with torch.device("meta"):
        config = AutoConfig.for_model(model_type, **SIZES.get(model_type, {}))
        return kinds.get(model_type, AutoModelForCausalLM).from_config(config)


@pytest.mark.parametrize(
    ("name", "model_type", "position", "parameters", "millions"), OFFICIAL_FILES
)
def test_official_files_become_adapters_of_their_base_models(
    name, model_type, position, parameters, millions
):
    path = official(name)
    model = model_of(model_type)
    target = Target(f"{model_type}-1x1-0", model)
    adapter, kind = convert_tensors(read_tensors(str(path)), target)
    assert kind == "RED vectors of the authors' code"
    assert adapter.sites == dict(sorted(red_sites(model, position).items()))
    assert adapter.num_parameters == parameters
    assert millions in (None, round(parameters / 1e6, 2))
    original = torch.load(path, map_location="cpu", weights_only=True)
    for site, edit in adapter.edits.items():
        assert torch.equal(edit.scale, original[site + SCALE][0].float())
        assert torch.equal(edit.bias, original[site + BIAS][0].float())


def test_official_heads_come_along(tmp_path, monkeypatch):
    path = official("roberta-base-qnli-redpp")
    (tmp_path / "torch.py").write_text("raise SystemExit('modules of the working folder ran')")
    monkeypatch.chdir(tmp_path)
    head = adapter_of(path.parent, labels=["entailment", "not_entailment"]).head
    original = torch.load(path.with_name("classifier.pth"), map_location="cpu", weights_only=True)
    assert head.config.kind == "roberta"
    assert head.config.labels == ("entailment", "not_entailment")
    assert head.config.problem_type == "single_label_classification"
    assert head.tensors.keys() == original.keys()
    assert all(torch.equal(head.tensors[name], original[name]) for name in original)


ONE = {"m" + BIAS: torch.ones(1, 4)}


def classifier(outputs):
    sizes = {"dense.weight": (4, 4), "dense.bias": (4,),
             "out_proj.weight": (outputs, 4), "out_proj.bias": (outputs,)}  # fmt: skip
    return {name: torch.randn(size) for name, size in sizes.items()}


@pytest.mark.parametrize(
    ("outputs", "labels", "problem_type"),
    [(2, ("LABEL_0", "LABEL_1"), "single_label_classification"), (1, ("LABEL_0",), "regression")],
)
def test_heads_without_labels_are_described_as_transformers_would(outputs, labels, problem_type):
    head = convert_tensors(ONE, Target(BASE), classifier=classifier(outputs)).adapter.head
    assert (head.config.labels, head.config.problem_type) == (labels, problem_type)


def test_a_head_of_electra_is_told_from_roberta_s_by_the_base_model():
    tensors = classifier(2)
    kinds = {
        model_type: convert_tensors(ONE, Target(f"{model_type}-4x1-0"), classifier=tensors)
        for model_type in ("electra", "roberta", "mpnet")
    }
    found = {model_type: made.adapter.head.config.kind for model_type, made in kinds.items()}
    assert found == {"electra": "electra", "roberta": "roberta", "mpnet": "roberta"}


def test_heads_of_unknown_kinds_and_labels_without_a_head_are_refused():
    with pytest.raises(InvalidAdapterError, match="no head, so there is nothing to label"):
        convert_tensors(ONE, Target(BASE), Options(labels=["a", "b"]))
    other = {"other.weight": torch.ones(2, 4)}
    with pytest.raises(InvalidAdapterError, match=r"'other\.weight' is of no known kind; known a"):
        convert_tensors(ONE, Target(BASE), classifier=other)


def test_file_of_the_same_layout_is_converted(tmp_path):
    scale, bias = torch.rand(1, 4), torch.rand(1, 4, dtype=torch.float16)
    path = write(tmp_path / "v.pth", {"h.0.c_proj" + SCALE: scale, "h.1.c_proj" + BIAS: bias})
    adapter = adapter_of(path)
    assert torch.equal(adapter.edits["h.0.c_proj"].scale, scale[0])
    assert torch.equal(adapter.edits["h.1.c_proj"].bias, bias[0].float())
    assert adapter.edits["h.1.c_proj"].scale.tolist() == [1] * 4
    assert adapter.base_fingerprint == BASE


def test_a_layer_norm_after_the_edit_computes_what_the_authors_layer_computes():
    """Their variant "ln": hidden states times scaling, plus bias, through an nn.LayerNorm."""
    scale, bias, norm = torch.randn(1, 4), torch.randn(1, 4), torch.nn.LayerNorm(4)
    for parameter in norm.parameters():
        parameter.data.normal_()
    content = {"h.m" + SCALE: scale, "h.m" + BIAS: bias}
    for name, tensor in norm.state_dict().items():
        content[f"h.m.delta_vector.activation_ln.{name}"] = tensor
    adapter = convert_tensors(content, Target(BASE)).adapter
    assert adapter.sites == {"h.m": 4, "h.m.activation_ln": 4}
    model = torch.nn.ModuleDict({"h": torch.nn.ModuleDict({"m": torch.nn.Identity()})})
    h = torch.randn(3, 4)
    with edited(model, adapter.edits), torch.no_grad():
        torch.testing.assert_close(model["h"]["m"](h), norm(h * scale + bias))


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path):
    path = write(tmp_path / "v.pth", {"m" + BIAS: Malicious(tmp_path / "ran")})
    with pytest.raises(InvalidAdapterError, match=r"unsupported GLOBAL posix\.mkdir"):
        adapter_of(path)
    assert not (tmp_path / "ran").exists()


def test_non_finite_values_are_refused_by_name():
    content = {"m" + BIAS: torch.tensor([[0, float("nan")]])}
    with pytest.raises(InvalidAdapterError, match=r"'m\.bias' has 1 non-finite .* index 1"):
        convert_tensors(content, Target(BASE))


def test_conversion_is_killed_when_it_takes_too_long(tmp_path):
    path = write(tmp_path / "v.pth", {"m" + BIAS: torch.ones(1, 4)})
    with pytest.raises(InvalidAdapterError, match=r"not be read within 0\.01 s"):
        adapter_of(path, timeout_s=0.01)


def test_worker_that_dies_is_reported(tmp_path, monkeypatch):
    path = write(tmp_path / "v.pth", {"m" + BIAS: torch.ones(1, 4)})
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(InvalidAdapterError, match="the converter ended with code 1"):
        adapter_of(path)


def test_worker_cannot_take_more_than_its_limits():
    program = (
        "import torch, resource\n"
        "from redmux_adapters.convert.worker import limit_resources\n"
        "limit_resources()\n"
        "assert resource.getrlimit(resource.RLIMIT_CPU)[0] <= 60\n"
        "assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] <= 68 << 20\n"
        "assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] <= 64\n"
        "torch.empty(1 << 30, dtype=torch.uint8)\n"
        "try:\n"
        "    torch.empty(3 << 30, dtype=torch.uint8)\n"
        "except RuntimeError:\n"
        "    raise SystemExit(7)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 7


def test_links_and_oversized_files_are_refused_unopened(tmp_path):
    path = write(tmp_path / "v.pth", {"m" + BIAS: torch.ones(1, 4)})
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(InvalidAdapterError, match="symbolic link"):
        adapter_of(tmp_path / "link")
    with (tmp_path / "big").open("wb") as file:
        file.truncate((64 << 20) + 1)
    with pytest.raises(InvalidAdapterError, match="has 67108865 bytes; limit 67108864"):
        adapter_of(tmp_path / "big")


def out_of_bounds():
    return torch.sparse_coo_tensor([[5]], torch.ones(1), (3,), check_invariants=False)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ([1], "holds 'list'; it has to hold a dictionary"),
        ({}, "holds 'dict'"),
        ({3: torch.ones(1, 4)}, "unexpected entry 3"),
        ({"m" + BIAS: "text"}, "is 'str', not a tensor"),
        ({"m" + BIAS: torch.ones(())}, r"shape \[\]"),
        ({"m" + BIAS: torch.ones(1, 0)}, r"shape \[1, 0\]"),
        ({"m" + BIAS: torch.ones(1, 1, 4)}, r"shape \[1, 1, 4\]; it has to be a vector or a ma"),
        ({"m" * 600: torch.ones(1, 4)}, "unexpected entry 'm{70,}"),
        ({"m" + BIAS: torch.ones(1, 4, dtype=torch.float64)}, "dtype torch.float64; allowed"),
        ({"m" + BIAS: torch.ones(1, 4, device="meta")}, "tensor on meta"),
        ({"m" + BIAS: torch.ones(1).expand(1, 2**40)}, "claims 1099511627776 values at stride 0"),
        ({"m" + BIAS: torch.ones(8).as_strided((1, 8), (8, 0))}, "claims 8 values at stride 0"),
        ({"m" + BIAS: torch.ones(8)[::2]}, "claims 4 values at stride 2"),
        ({"m" + BIAS: torch.ones(3).to_sparse()}, "torch.sparse_coo tensor on cpu"),
        ({"m" + BIAS: out_of_bounds()}, "torch refuses the file: 'size is inconsistent"),
        (
            {f"{i}{BIAS}": torch.ones(1) for i in range(4097)},
            "holds 4097 entries; limit 4096",
        ),
    ],
)  # fmt: skip
def test_anything_but_dense_tensors_is_refused(tmp_path, content, error):
    path = write(tmp_path / "v.pth", content)
    with pytest.raises(InvalidAdapterError, match=error):
        read_tensors(path)


def test_many_views_of_one_storage_are_not_multiplied(tmp_path):
    shared = torch.ones(1, 1 << 18)  # 1 MiB
    path = write(tmp_path / "v.pth", {f"m.{i}{BIAS}": shared for i in range(65)})
    assert os.path.getsize(path) < 2 << 20
    with pytest.raises(InvalidAdapterError, match="the tensors exceed 67108864 bytes"):
        read_tensors(path)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ({"m.weight": torch.ones(1, 4)}, "unexpected entry 'm.weight'; known are files of RED"),
        ({"m.x": torch.ones(4), "m" + BIAS: torch.ones(4)}, "unexpected entry 'm.x'; names end in"),
        ({"../m" + BIAS: torch.ones(1, 4)}, "'../m' is no module path"),
        ({BIAS: torch.ones(1, 4)}, "module path '' has 0"),
        ({"m" + BIAS: torch.ones(2, 4)}, r"shape \[2, 4\]; it has to be \[1, hidden size\]"),
        (
            {"m" + BIAS: torch.ones(1, 4), "module.m" + BIAS: torch.ones(1, 4)},
            "'m.bias' occurs twice, under different prefixes",
        ),
        ({"base_model.model.m.lora_A.weight": torch.ones(2, 4)}, "LoRA adds a product of matrices"),
        (
            {"classifier.weight": torch.ones(2, 4), "classifier.bias": torch.ones(2)},
            "a classification head alone; convert the delta_vector.pth",
        ),
        ({"prompt_embeddings": torch.ones(2, 4)}, "prompt tuning puts tokens before the prompt"),
    ],
)
def test_entries_that_are_no_edits_are_refused_by_name(content, error):
    with pytest.raises(InvalidAdapterError, match=error):
        convert_tensors(content, Target(BASE))


@pytest.mark.parametrize("prefix", ["", "module.", "base_model.", "module.base_model."])
def test_wrapper_prefixes_are_stripped(prefix):
    edits = read_delta_vector({f"{prefix}model.layers.0.x{BIAS}": torch.ones(1, 2)})
    assert list(edits) == ["model.layers.0.x"]


def test_views_and_parameters_are_copied_out(tmp_path):
    whole = torch.arange(10.0)
    content = {"a" + BIAS: whole[3:6], "b" + SCALE: torch.nn.Parameter(whole[None])}
    tensors = read_tensors(write(tmp_path / "v.pth", content))
    assert tensors["a" + BIAS].tolist() == [3, 4, 5]
    assert tensors["a" + BIAS].untyped_storage().nbytes() == 12
    assert tensors["b" + SCALE].tolist() == [whole.tolist()]


def repack(path, **options):
    """Packs a torch.save file again, for example with compression."""
    with zipfile.ZipFile(path) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in entries:
            archive.writestr(name, data)


def test_no_tensors_at_all_are_an_invalid_adapter():
    with pytest.raises(InvalidAdapterError, match="the file holds no tensors"):
        convert_tensors({}, Target(BASE))


def test_vectors_of_two_sizes_are_refused_with_their_module():
    tensors = {"h.0.mlp" + SCALE: torch.ones(1, 4), "h.0.mlp" + BIAS: torch.ones(1, 3)}
    with pytest.raises(InvalidAdapterError, match=r"scale of 'h.0.mlp' has 4 values and its b"):
        convert_tensors(tensors, Target(BASE))


def test_a_head_has_to_have_the_hidden_size_of_the_base_at_hand():
    model = model_of("roberta")
    edits = {"encoder.layer.0.output.dense" + BIAS: torch.ones(1, model.config.hidden_size)}
    target = Target("roberta-768x12-0", model)
    fitting = {"weight": torch.ones(3, 768), "bias": torch.ones(3)}
    head = {"dense.weight": torch.ones(768, 768), "dense.bias": torch.ones(768)}
    head |= {f"out_proj.{name}": tensor for name, tensor in fitting.items()}
    assert convert_tensors(edits, target, classifier=head).adapter.head is not None
    narrow = {name: tensor[..., :512] for name, tensor in head.items()}
    narrow["dense.weight"] = torch.ones(512, 512)
    with pytest.raises(InvalidAdapterError, match=r"\[512, 512\]; for 3 labels and hidden size"):
        convert_tensors(edits, target, classifier=narrow)


def test_archives_that_inflate_are_refused_before_unpickling(tmp_path):
    path = write(tmp_path / "v.pth", {"m" + BIAS: torch.zeros(1, 17 << 20)})
    repack(path, compression=zipfile.ZIP_DEFLATED)
    assert os.path.getsize(path) < 1 << 20
    with pytest.raises(InvalidAdapterError, match=r"unpacks to 713\d+ bytes; limit 67108864"):
        check_archive(path)
    with pytest.raises(InvalidAdapterError, match="unpacks to"):
        read_tensors(path)


def test_compressed_archives_are_refused(tmp_path):
    path = write(tmp_path / "v.pth", {"m" + BIAS: torch.zeros(1, 4)})
    repack(path)
    check_archive(path)
    repack(path, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(InvalidAdapterError, match="is compressed, which torch"):
        check_archive(path)


def test_a_flipped_byte_in_any_entry_is_found_by_its_checksum(tmp_path):
    path = tmp_path / "v.pth"
    write(path, {"m" + BIAS: torch.arange(4.0)[None]})
    whole = path.read_bytes()
    place = whole.index(torch.arange(4.0).numpy().tobytes()) + 5
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(InvalidAdapterError, match=r"data/0' does not have its checksum: .*damaged"):
        read_tensors(str(path))


def test_files_that_are_no_archives_are_refused(tmp_path):
    old = write(
        tmp_path / "old", {"m" + BIAS: torch.ones(1, 4)}, _use_new_zipfile_serialization=False
    )
    (tmp_path / "noise").write_bytes(b"\x80\x02" + b"x" * 100)
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("data", b"x")
    for path in (old, tmp_path / "noise"):
        with pytest.raises(InvalidAdapterError, match="bare pickle, as torch"):
            read_tensors(str(path))
    (tmp_path / "text").write_text("vectors")
    with pytest.raises(InvalidAdapterError, match=r"neither one of torch.save .* nor GGUF nor"):
        read_tensors(str(tmp_path / "text"))
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\3\0\0\0")
    with pytest.raises(InvalidAdapterError, match="the GGUF file cannot be read"):
        read_tensors(str(tmp_path / "cut.gguf"))
    with pytest.raises(InvalidAdapterError, match="torch refuses the file"):
        read_tensors(str(tmp_path / "other.zip"))
