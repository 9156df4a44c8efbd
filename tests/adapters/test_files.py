import json
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from redmux.errors import InvalidAdapterError
from redmux_adapters import (
    Adapter,
    AdapterMetadata,
    Edit,
    Limits,
    PromptFormat,
    Turn,
    parse_adapter,
    read_adapter,
    summarize,
    to_bytes,
    write_folder,
)

BASE = "llama-4x2-0"
CONFIG = json.dumps({"peft_type": "RED", "base_fingerprint": BASE})
WEIGHTS = "adapter_model.safetensors"
quick = settings(deadline=None, database=None, max_examples=40)

# Eighths up to 16: the same in fp32, fp16 and bf16.
exact = st.integers(-128, 128).map(lambda n: n / 8)
part = st.text("abcXYZ019_", min_size=1, max_size=4)
sites = st.lists(part, min_size=1, max_size=4).map(".".join)
texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=20)
turns = st.builds(Turn, texts, texts)


@st.composite
def edits(draw, values):
    dim = draw(st.integers(1, 5))
    vectors = st.lists(values, min_size=dim, max_size=dim).map(torch.tensor)
    return Edit(draw(vectors), draw(vectors))


def adapters(values):
    return st.builds(
        Adapter,
        st.just(BASE),
        st.dictionaries(sites, edits(values), min_size=1, max_size=4),
        st.none() | st.builds(PromptFormat, turns, turns, st.none() | turns),
        st.builds(AdapterMetadata, texts, texts, texts),
    )


any_adapters = adapters(st.floats(-1e4, 1e4, width=32))


def sample(**changes):
    edit = Edit(torch.tensor([1.0, 2, 3, 4]), torch.tensor([0.5, 0, 0, -1]))
    return Adapter(BASE, {"m.0.out": edit, "m.1.out": Edit.identity(4)}, **changes)


def same_vectors(one, other):
    return all(
        torch.equal(one.edits[site].scale, edit.scale)
        and torch.equal(one.edits[site].bias, edit.bias)
        for site, edit in other.edits.items()
    )


@given(any_adapters)
@quick
def test_one_file_round_trips(adapter):
    data = to_bytes(adapter)
    read = parse_adapter(data)
    assert read == adapter
    assert same_vectors(read, adapter)
    assert to_bytes(read) == data


@given(any_adapters)
@quick
def test_a_summary_says_what_the_adapter_says(adapter):
    summary = summarize(to_bytes(adapter))
    assert summary.digest == adapter.digest
    assert summary.config.base_fingerprint == adapter.base_fingerprint
    assert summary.config.prompt_format == adapter.prompt_format
    assert summary.config.metadata == adapter.metadata
    assert summary.num_sites == len(adapter.edits)
    assert (summary.num_parameters, summary.nbytes) == (adapter.num_parameters, adapter.nbytes)


@given(adapters(exact), st.data())
@quick
def test_a_file_is_read_as_the_safetensors_library_reads_it(adapter, data):
    tensors = {}
    for site, edit in adapter.edits.items():
        tensors[f"{site}.scale"], tensors[f"{site}.bias"] = edit.scale, edit.bias
    types = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
    stored = save({name: vector.to(data.draw(types)) for name, vector in tensors.items()})
    expected = {name: vector.float() for name, vector in load(stored).items()}
    read = parse_adapter(stored, CONFIG)
    for site, edit in read.edits.items():
        assert torch.equal(edit.scale, expected[f"{site}.scale"])
        assert torch.equal(edit.bias, expected[f"{site}.bias"])


@given(any_adapters)
@quick
def test_folder_round_trips(tmp_path_factory, adapter):
    folder = tmp_path_factory.mktemp("adapter") / "new" / "folder"
    write_folder(adapter, folder)
    assert sorted(os.listdir(folder)) == ["adapter_config.json", WEIGHTS]
    read = read_adapter(folder)
    assert read == adapter
    assert same_vectors(read, adapter)
    assert read.prompt_format == adapter.prompt_format


@given(adapters(exact), st.data())
@quick
def test_digest_depends_on_no_storage_detail(adapter, data):
    tensors = {}
    for site, edit in adapter.edits.items():
        tensors[f"{site}.scale"], tensors[f"{site}.bias"] = edit.scale, edit.bias
    types = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
    names = data.draw(st.permutations(sorted(tensors)))
    stored = save({name: tensors[name].to(data.draw(types)) for name in names})
    written = json.loads(to_bytes(adapter)[8:].partition(b"}}")[0] + b"}}")
    config = written["__metadata__"]["adapter_config"]
    assert parse_adapter(stored, config).digest == adapter.digest


def test_missing_scale_is_one_and_missing_bias_zero():
    data = save({"a.scale": torch.tensor([2.0, 3]), "b.bias": torch.tensor([4.0])})
    adapter = parse_adapter(data, CONFIG)
    assert adapter.edits["a"].bias.tolist() == [0, 0]
    assert adapter.edits["b"].scale.tolist() == [1]
    full = {"a": Edit(torch.tensor([2.0, 3]), torch.zeros(2))}
    full["b"] = Edit(torch.ones(1), torch.tensor([4.0]))
    assert adapter == Adapter(BASE, full)


def test_other_safetensors_readers_read_ours():
    tensors = load(to_bytes(sample()))
    assert sorted(tensors) == ["m.0.out.bias", "m.0.out.scale", "m.1.out.bias", "m.1.out.scale"]
    assert tensors["m.0.out.scale"].tolist() == [1, 2, 3, 4]


def test_single_file_on_disk_is_read(tmp_path):
    path = tmp_path / "one.safetensors"
    path.write_bytes(to_bytes(sample()))
    assert read_adapter(path) == sample()
    assert read_adapter(str(path)) == sample()


def test_saving_again_replaces(tmp_path):
    write_folder(sample(), tmp_path)
    changed = sample(metadata=AdapterMetadata(license="MIT"))
    write_folder(changed, tmp_path)
    assert read_adapter(tmp_path) == changed
    assert len(list(tmp_path.iterdir())) == 2


def test_failed_save_leaves_the_old_adapter(tmp_path, monkeypatch):
    write_folder(sample(), tmp_path)

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", no_space)
    with pytest.raises(OSError, match="No space"):
        write_folder(sample(metadata=AdapterMetadata(license="MIT")), tmp_path)
    assert read_adapter(tmp_path) == sample()
    assert len(list(tmp_path.iterdir())) == 2


def test_an_adapter_too_large_to_be_read_is_not_written(tmp_path):
    many = Adapter(BASE, {f"layer.{i}": Edit.identity(1) for i in range(2049)})
    with pytest.raises(InvalidAdapterError, match="4098 tensors; limit 4096"):
        write_folder(many, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_same_configuration_inside_and_outside_is_fine():
    data = to_bytes(sample())
    assert parse_adapter(data, CONFIG) == sample()
    with pytest.raises(InvalidAdapterError, match="differs from the one in the file's"):
        parse_adapter(data, CONFIG.replace(BASE, "other"))


@pytest.mark.parametrize("config", [None, ""])
def test_missing_configuration_is_named(config):
    with pytest.raises(InvalidAdapterError, match=r"no adapter_config\.json: give it beside"):
        parse_adapter(save({"a.scale": torch.ones(2)}), config)


def test_configuration_size_is_limited():
    for text in ("{" + " " * 100 + "}", "\u20ac" * 40):
        with pytest.raises(InvalidAdapterError, match=r"adapter_config\.json has \d+ bytes; limit"):
            parse_adapter(to_bytes(sample()), text, limits=Limits(config_bytes=100))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_values_are_named_with_tensor_and_index(dtype, bad):
    data = save({"a.scale": torch.tensor([1, 1, bad, bad]).to(dtype)})
    with pytest.raises(InvalidAdapterError, match=r"'a.scale' has 2 non-finite .* at index 2"):
        parse_adapter(data, CONFIG)


def test_huge_values_are_refused():
    with pytest.raises(InvalidAdapterError, match=r"'a.bias' has the value 1e\+30 at index 1"):
        parse_adapter(save({"a.bias": torch.tensor([0, 1e30])}), CONFIG)


def test_scale_and_bias_have_one_length():
    data = save({"a.scale": torch.ones(2), "a.bias": torch.ones(3)})
    with pytest.raises(InvalidAdapterError, match=r"scale and bias of 'a' have \d and \d values"):
        parse_adapter(data, CONFIG)


EXPECTED = {f"model.layers.{i}.mlp.down_proj": 4 for i in range(12)}


def one(site, dim):
    return save({f"{site}.scale": torch.ones(dim)})


def test_expected_sites_need_not_all_be_edited():
    adapter = parse_adapter(one("model.layers.3.mlp.down_proj", 4), CONFIG, expected_sites=EXPECTED)
    assert list(adapter.edits) == ["model.layers.3.mlp.down_proj"]


def test_unknown_site_is_refused_with_three_near_ones(tmp_path):
    with pytest.raises(InvalidAdapterError, match=r"no editable module 'layers\.3\.mlp") as error:
        parse_adapter(one("layers.3.mlp.down_proj", 4), CONFIG, expected_sites=EXPECTED)
    near = error.value.message.partition("near: ")[2].split(", ")
    assert near[0] == "model.layers.3.mlp.down_proj"
    assert len(near) == 3
    write_folder(sample(), tmp_path)
    with pytest.raises(InvalidAdapterError, match=r"'m\.0\.out'; near: model"):
        read_adapter(tmp_path, expected_sites=EXPECTED)


def test_sites_that_are_blocks_of_modules_are_named_as_such():
    data = to_bytes(Adapter.identity({"m.0": 4}, BASE))
    with pytest.raises(InvalidAdapterError, match=r"'m\.0' is a block of modules whose output"):
        parse_adapter(data, expected_sites={"m.0.out": 4})


def test_wrong_size_is_refused_naming_the_right_one():
    with pytest.raises(InvalidAdapterError, match="have 5 values; this module has 4 outputs"):
        parse_adapter(one("model.layers.3.mlp.down_proj", 5), CONFIG, expected_sites=EXPECTED)


def test_symbolic_links_are_refused(tmp_path):
    write_folder(sample(), tmp_path / "real")
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "real" / WEIGHTS)
    with pytest.raises(InvalidAdapterError, match="is a symbolic link"):
        read_adapter(tmp_path / "link.safetensors")
    (tmp_path / "real" / "adapter_config.json").rename(tmp_path / "config")
    (tmp_path / "real" / "adapter_config.json").symlink_to(tmp_path / "config")
    with pytest.raises(InvalidAdapterError, match=r"adapter_config\.json is a symbolic link"):
        read_adapter(tmp_path / "real")


def test_pipes_and_devices_are_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(InvalidAdapterError, match="is not a regular file"):
            read_adapter(path)


def test_size_is_checked_before_reading(tmp_path):
    with (tmp_path / "big").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(InvalidAdapterError, match="has 1099511627776 bytes; limit 67108864"):
        read_adapter(tmp_path / "big")


def test_a_file_that_comes_in_pieces_is_read_whole(tmp_path, monkeypatch):
    path = tmp_path / WEIGHTS
    path.write_bytes(to_bytes(Adapter(BASE, {"a": Edit(torch.ones(50), torch.zeros(50))})))
    read = os.read
    monkeypatch.setattr(os, "read", lambda descriptor, count: read(descriptor, min(count, 100)))
    assert read_adapter(path) == parse_adapter(path.read_bytes())


def test_incomplete_folders_are_refused(tmp_path):
    with pytest.raises(InvalidAdapterError, match=r"cannot open .*adapter_config\.json: No such"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(b"")
    with pytest.raises(InvalidAdapterError, match=r"cannot open .*safetensors: No such"):
        read_adapter(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(to_bytes(sample()))
    with pytest.raises(InvalidAdapterError, match=r"adapter_config\.json is empty"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(b"\xff")
    with pytest.raises(InvalidAdapterError, match="not UTF-8"):
        read_adapter(tmp_path)
    with pytest.raises(InvalidAdapterError, match="possible path"):
        read_adapter("a\0b")
