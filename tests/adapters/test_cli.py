import copy
import dataclasses
import json
import os
import re
import sys

import pytest
import torch

from redmux.cli import main as redmux_command
from redmux_adapters import (
    Adapter,
    AdapterMetadata,
    Edit,
    Head,
    HeadConfig,
    PromptFormat,
    Turn,
    fingerprint,
    read_adapter,
    to_bytes,
    write_folder,
)
from redmux_adapters import cli as module
from redmux_adapters.cli import main

BASE = "llama-8x11-0"
FORMAT = PromptFormat(Turn("<u>\n", ""), Turn("<a>", ""))


@pytest.fixture
def folder(tmp_path):
    edits = {f"m.{i}.out": Edit.identity(3) for i in range(11)}
    edits["m.2.out"] = Edit(torch.tensor([1, 0.5, 2]), torch.tensor([-0.25, 0, 40.3189]))
    metadata = AdapterMetadata(description="two\nlines", license="MIT")
    path = tmp_path / "acme-summary"
    write_folder(Adapter(BASE, edits, FORMAT, metadata), path)
    return path


@pytest.fixture
def base(monkeypatch):
    """A tiny model in the place of whatever `--base` names."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=8, n_embd=4, n_layer=2, n_head=1, n_positions=8)
    model = GPT2LMHeadModel(config)
    monkeypatch.setattr(module, "load_any", lambda spec: model)
    return model


def test_show_prints_a_table_in_the_order_of_layers(folder, capsys):
    assert main(["show", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "name                    acme-summary",
        f"digest                  {read_adapter(folder).digest}",
        f"base_fingerprint        {BASE}",
    ]
    assert "num_parameters          66" in lines
    assert "description             two lines" in lines
    assert "sites                   11" in lines
    assert " ".join(lines[-12].split()) == ("site size scale from to |scale-1| bias from to |bias|")
    norms = (f"{1.25**0.5:.5g}", f"{(0.0625 + 40.3189**2) ** 0.5:.5g}")
    expected = ["m.2.out", "3", "0.5", "2", norms[0], "-0.25", "40.319", norms[1]]
    assert lines[-9].split() == expected
    assert "edits                   scale and bias" in lines
    assert [line.split()[0] for line in lines[-11:]] == [f"m.{i}.out" for i in range(11)]


def test_show_tells_the_licence_also_where_none_is_stated(folder, tmp_path, capsys):
    assert main(["show", str(folder)]) == 0
    assert "license                 MIT\n" in capsys.readouterr().out
    write_folder(Adapter(BASE, {"m": Edit.identity(3)}), tmp_path / "bare")
    assert main(["show", str(tmp_path / "bare")]) == 0
    assert "license                 not stated\n" in capsys.readouterr().out


def test_show_json_is_complete(folder, capsys):
    assert main(["show", str(folder), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    adapter = read_adapter(folder)
    assert shown["digest"] == adapter.digest
    assert shown["prompt_format"] == FORMAT.to_json()
    assert shown["metadata"]["description"] == "two\nlines"
    assert {site["path"]: site["size"] for site in shown["sites"]} == adapter.sites
    assert shown["size_bytes"] == 4 * shown["num_parameters"] == 264


@pytest.mark.parametrize(
    ("scale", "bias", "edits"),
    [
        ([1.0, 2], [0.0, 0], "scale only"),
        ([1.0, 1], [0.0, 1], "bias only"),
        ([1.0, 1], [0.0, 0], "none, it changes nothing"),
    ],
)
def test_show_tells_the_variant(scale, bias, edits, tmp_path, capsys):
    write_folder(Adapter(BASE, {"m": Edit(torch.tensor(scale), torch.tensor(bias))}), tmp_path)
    assert main(["show", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["edits"] == edits


def test_show_tells_of_the_head(tmp_path, capsys):
    tensors = {"classifier.weight": torch.ones(2, 3), "classifier.bias": torch.ones(2)}
    head = Head(HeadConfig("bert", ("a", "b"), "multi_label_classification"), tensors)
    write_folder(Adapter(BASE, {"m": Edit.identity(3)}, head=head), tmp_path)
    assert main(["show", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert '"labels": ["a", "b"], "problem_type": "multi_label_class' in out
    assert '"num_parameters": 8' in out
    assert "num_parameters          6\n" in out


def test_plot_draws_a_line_per_kind_of_site(folder, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    drawn = []
    draw = Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda self, x, y, **k: drawn.append((x, y, k)) or draw(self, x, y, **k)
    )
    picture = tmp_path / "norms.png"
    assert main(["show", str(folder), "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    (layers, scales, options), (_, biases, _) = drawn
    assert options["label"] == "m.*.out"
    assert list(layers) == list(range(11))
    assert scales[2] == pytest.approx((1.25 / 3) ** 0.5)
    assert biases[2] == pytest.approx(((0.0625 + 40.3189**2) / 3) ** 0.5)
    assert scales[3] == biases[3] == 0


def test_plots_without_matplotlib_say_what_to_install(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["show", str(folder), "--plot", "x.png"]) == 1
    assert "pip install 'redmux[plot]'" in capsys.readouterr().err


def test_show_reads_single_files(folder, tmp_path, capsys):
    (tmp_path / "one.safetensors").write_bytes(to_bytes(read_adapter(folder)))
    assert main(["show", str(tmp_path / "one.safetensors")]) == 0
    assert "name                    one\n" in capsys.readouterr().out


def test_pack_writes_one_file_with_the_same_adapter_and_its_metadata(folder, tmp_path, capsys):
    file = tmp_path / "new" / "one.safetensors"
    assert main(["pack", str(folder), "--output", str(file)]) == 0
    adapter = read_adapter(folder)
    assert adapter.digest in capsys.readouterr().out
    assert read_adapter(file) == adapter
    assert file.read_bytes() == to_bytes(adapter)
    assert [path.name for path in file.parent.iterdir()] == ["one.safetensors"]


def test_pack_writes_nothing_that_put_would_not_take(folder, tmp_path, capsys):
    assert main(["pack", str(folder), "--output", str(tmp_path / "one.bin")]) == 1
    assert "does not end with .safetensors" in capsys.readouterr().err
    assert not (tmp_path / "one.bin").exists()


def test_verify_says_what_it_checked(folder, capsys):
    assert main(["verify", str(folder)]) == 0
    out = capsys.readouterr().out
    assert out == f"ok {read_adapter(folder).digest} for {BASE}: 11 sites, 66 parameters\n"


def test_verify_prints_json(folder, base, capsys):
    assert main(["verify", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "digest": read_adapter(folder).digest, "base_fingerprint": BASE, "num_sites": 11,
        "num_parameters": 66, "base_match": None,
    }  # fmt: skip


def test_create_writes_an_identity_that_fits_its_base(base, tmp_path, capsys):
    assert main(["create", "--base", "gpt2", "--output", str(tmp_path / "new")]) == 0
    assert main(["verify", str(tmp_path / "new"), "--base", "gpt2"]) == 0
    adapter = read_adapter(tmp_path / "new")
    assert adapter == Adapter.identity(base, metadata=adapter.metadata)
    assert adapter.metadata.base_model_name_or_path == "gpt2"


def test_folders_of_this_machine_are_not_written_into_adapters(base, tmp_path):
    (tmp_path / "my-model").mkdir()
    args = ["create", "--base", str(tmp_path / "my-model"), "--output", str(tmp_path / "new")]
    assert main(args) == 0
    assert read_adapter(tmp_path / "new").metadata.base_model_name_or_path == "my-model"


def test_verify_refuses_another_base(folder, base, capsys):
    assert main(["verify", str(folder), "--base", "gpt2"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(
        f"error: the adapter was made for base '{BASE}', this base is 'g"
    )


def test_verify_refuses_sites_that_the_base_lacks(base, tmp_path, capsys):
    edits = {"transformer.h.2.mlp.c_proj": Edit.identity(4)}
    write_folder(Adapter(Adapter.identity(base).base_fingerprint, edits), tmp_path)
    assert main(["verify", str(tmp_path), "--base", "gpt2"]) == 1
    assert "no editable module 'transformer.h.2.mlp.c_proj'; near: " in capsys.readouterr().err


def test_create_takes_a_position_and_layers(base, tmp_path, capsys):
    create = ["create", "--base", "gpt2", "--output", str(tmp_path / "new")]
    assert main([*create, "--position", "more", "--layers", "0-1", "--exclude", "0"]) == 0
    assert read_adapter(tmp_path / "new").sites == {
        "transformer.h.1.attn.c_attn": 12,
        "transformer.h.1.attn.c_proj": 4,
        "transformer.h.1.mlp.c_proj": 4,
    }
    assert capsys.readouterr().err == ""
    assert main([*create, "--position", "res"]) == 0
    assert read_adapter(tmp_path / "new").sites == {"transformer.h.0": 4, "transformer.h.1": 4}
    assert capsys.readouterr().err == ""
    assert main([*create, "--layers", "7"]) == 1
    assert "no layer 7; the model has layers 0 to 1" in capsys.readouterr().err


def test_sites_that_no_server_edits_are_named(base, tmp_path, capsys):
    write_folder(Adapter.identity({"transformer.h.0.ln_1": 4}, fingerprint(base)), tmp_path)
    assert main(["verify", str(tmp_path), "--base", "gpt2"]) == 0
    assert "will refuse 1 sites, such as transformer.h.0.ln_1;" in capsys.readouterr().err


def delta_vector(path, site="transformer.h.1.mlp.c_proj"):
    torch.save({f"{site}.delta_vector.activation_bias": torch.ones(1, 4)}, path)
    return str(path)


def test_convert_writes_a_folder_for_a_base(base, tmp_path, capsys):
    source = delta_vector(tmp_path / "v.pth")
    assert main(["convert", source, "--base", "gpt2", "--output", str(tmp_path / "new")]) == 0
    assert main(["verify", str(tmp_path / "new"), "--base", "gpt2"]) == 0
    adapter = read_adapter(tmp_path / "new")
    assert adapter.edits["transformer.h.1.mlp.c_proj"].bias.tolist() == [1, 1, 1, 1]


def test_convert_takes_a_fingerprint_instead_of_a_model(tmp_path, capsys):
    source = delta_vector(tmp_path / "v.pth", "any.module")
    new = tmp_path / "new"
    assert main(["convert", source, "--base-fingerprint", "x-1", "--output", str(new)]) == 0
    assert read_adapter(new).base_fingerprint == "x-1"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["convert", "v.pth", "--output", "x"],
        ["convert", "v.pth", "--output", "x", "--base", "a", "--base-fingerprint", "b"],
        ["create", "--output", "x"],
        ["create", "--output", "x", "--base", "a", "--layers", "3-"],
        ["show", "x", "--unknown"],
    ],
)
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert "usage: redmux adapters" in capsys.readouterr().err


def test_errors_are_one_line(tmp_path, folder, capsys):
    os.mkfifo(tmp_path / "pipe")
    for arguments in (
        ["show", str(tmp_path / "absent")],
        ["verify", str(tmp_path / "pipe")],
        ["convert", str(tmp_path / "absent"), "--base-fingerprint", "b", "--output", "x"],
    ):
        assert main(arguments) == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("error: ")
        assert captured.err.count("\n") == 1


def test_unwritable_output_is_an_error_not_a_traceback(base, folder, capsys):
    assert main(["create", "--base", "gpt2", "--output", str(folder / "adapter_config.json")]) == 1
    assert "File exists" in capsys.readouterr().err


def relative(base):
    """The adapter of a base with other weights, in modules of the same sizes."""
    model = copy.deepcopy(base)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_proj.weight.mul_(1.5)
    return Adapter.identity(model)


def test_an_adapter_of_a_relative_is_verified_and_folded_only_if_asked(base, tmp_path, capsys):
    write_folder(relative(base), tmp_path / "theirs")
    command = ["verify", str(tmp_path / "theirs"), "--base", "gpt2"]
    assert main(command) == 1
    assert "--allow-other-base" in capsys.readouterr().err
    assert main([*command, "--allow-other-base"]) == 0
    assert capsys.readouterr().out.endswith("; base: other\n")


def test_stamp_makes_an_older_adapter_one_of_this_base(base, tmp_path, capsys):
    """As those have it whose fingerprint ends before the weights."""
    old = dataclasses.replace(
        Adapter.identity(base), base_fingerprint=fingerprint(base).rsplit("-", 2)[0]
    )
    write_folder(old, tmp_path / "old")
    new = str(tmp_path / "new")
    assert main(["verify", str(tmp_path / "old"), "--base", "gpt2"]) == 0
    assert capsys.readouterr().out.endswith("; base: unverified\n")
    assert main(["stamp", str(tmp_path / "old"), "--base", "gpt2", "--output", new]) == 0
    capsys.readouterr()
    assert main(["verify", new, "--base", "gpt2"]) == 0
    assert capsys.readouterr().out.endswith("; base: same\n")
    assert read_adapter(new).edits.keys() == old.edits.keys()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("chatml", Turn("<|im_start|>user\n", "<|im_end|>\n")),
        ("raw", Turn("", "")),
        ('{"user": ["H: ", "\\n"], "assistant": ["A: ", ""]}', Turn("H: ", "\n")),
        ('{"type": "turns", "user": ["<u>", ""], "assistant": ["<a>", ""]}', Turn("<u>", "")),
    ],
)
def test_convert_says_how_prompts_were_written(tmp_path, text, expected):
    source, new = delta_vector(tmp_path / "v.pth"), tmp_path / "new"
    options = ["--prompt-format", text, "--description", "Answers.", "--license", "MIT"]
    command = ["convert", source, "--base-fingerprint", "x-1", "--output", str(new), *options]
    assert main(command) == 0
    adapter = read_adapter(new)
    assert adapter.prompt_format.user == expected
    assert (adapter.metadata.description, adapter.metadata.license) == ("Answers.", "MIT")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--prompt-format", "chatty", "give chatml, raw, or turns"),
        ("--prompt-format", '{"user": ["a", "b"]}', "assistant"),
        ("--prompt-format", '["a"]', "has to be an object"),
        ("--timeout", "0", "no number of seconds above 0"),
        ("--timeout", "nan", "no number of seconds above 0"),
    ],
)
def test_convert_refuses_options_that_say_nothing(option, value, message, capsys):
    arguments = ["convert", "v.pth", "--base-fingerprint", "x", "--output", "y", option, value]
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_a_file_that_takes_too_long_is_an_error_with_advice(tmp_path, capsys):
    source = delta_vector(tmp_path / "v.pth")
    command = ["convert", source, "--base-fingerprint", "x-1", "--output", str(tmp_path / "new")]
    assert main([*command, "--timeout", "0.001"]) == 1
    assert "within 0.001 s; on a busy machine, try again with a larger --timeout" in (
        capsys.readouterr().err
    )


def test_the_command_redmux_knows_every_command_for_adapter_files(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    verbs = re.findall(r"^    (\w+) ", capsys.readouterr().out, re.MULTILINE)
    assert "stamp" in verbs
    for verb in verbs:
        assert redmux_command(["adapters", verb, "--help"]) == 0, verb
    capsys.readouterr()
    redmux_command(["adapters", "--help"])
    listed = re.findall(r"^    (\w+) ", capsys.readouterr().out, re.MULTILINE)
    assert set(verbs) < set(listed)


@pytest.fixture
def two(tmp_path, monkeypatch):
    """Two folders, a and b, of adapters whose edits are easy to add up."""
    monkeypatch.chdir(tmp_path)
    for name, bias in (("a", 1.0), ("b", 10.0)):
        edits = {
            f"m.{i}.out": Edit(torch.tensor([1 + bias, 1.0]), torch.tensor([bias, 0.0]))
            for i in range(3)
        }
        write_folder(Adapter(BASE, edits, FORMAT), name)
    return tmp_path


def test_mix_writes_an_adapter_whose_metadata_has_the_recipe(two, capsys):
    assert redmux_command(["adapters", "mix", "a:0.5", "b:0.25", "--output", "new"]) == 0
    adapter = read_adapter("new")
    assert adapter.digest in capsys.readouterr().out
    assert adapter.edits["m.1.out"].scale.tolist() == [1 + 0.5 + 2.5, 1]
    assert adapter.edits["m.1.out"].bias.tolist() == [0.5 + 2.5, 0]
    assert adapter.prompt_format == FORMAT
    parts = json.loads(adapter.metadata.training)["parts"]
    digests = {read_adapter("a").digest: 0.5, read_adapter("b").digest: 0.25}
    assert {part["digest"]: part["weight"] for part in parts} == digests


def test_mix_composes_in_order_with_strength_and_layers(two):
    options = ["--how", "compose", "--strength", "0.5", "--layers", "1-2", "--output", "new"]
    assert main(["mix", "a", "b:1:0", *options]) == 0
    edits = read_adapter("new").edits
    assert edits["m.0.out"].bias.tolist() == [5, 0]  # b alone, half of it
    assert edits["m.2.out"].bias.tolist() == [0.5, 0]  # a alone
    assert main(["mix", "a", "b", "--how", "compose", "--output", "new"]) == 0
    edit = read_adapter("new").edits["m.0.out"]
    assert edit.scale.tolist() == [22, 1]
    assert edit.bias.tolist() == [21, 0]


def test_mix_refuses_what_is_no_part_or_does_not_fit(two, capsys):
    for part, told in (("b:1000", "at most 100"), ("b:1:3-1", "layers of 'b'")):
        with pytest.raises(SystemExit):
            main(["mix", "a:0.5", part, "--output", "new"])
        assert told in capsys.readouterr().err
    assert main(["mix", "a", "b:1:7", "--output", "new"]) == 1
    assert "'b' edits nothing in the layers 7" in capsys.readouterr().err
    assert not (two / "new").exists()
