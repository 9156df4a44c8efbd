"""Adapters given at start: mistakes are told with file and remedy, before a model loads."""

import pytest

import redmux_server.app
from redmux.errors import InvalidAdapterError, InvalidArgumentError, WrongBaseError
from redmux_adapters import to_bytes, write_folder
from redmux_server.config import ServerConfig
from redmux_server.registry.given import read_given, zoo_folder


@pytest.fixture
def folder(tmp_path, adapters):
    """Adapters in both forms, and what is none."""
    write_folder(adapters[0], tmp_path / "many" / "one")
    write_folder(adapters[1], tmp_path / "many" / "two")
    write_folder(adapters[1], tmp_path / "other" / "one")
    write_folder(adapters[1], tmp_path / "v1.5")
    write_folder(adapters[0], tmp_path / "My-Adapter_v1")
    (tmp_path / "three.safetensors").write_bytes(to_bytes(adapters[2]))
    (tmp_path / "cut.safetensors").write_bytes(to_bytes(adapters[2])[:-4])
    (tmp_path / "torn" / "good").mkdir(parents=True)
    write_folder(adapters[0], tmp_path / "torn" / "good")
    write_folder(adapters[0], tmp_path / "torn" / "bad")
    (tmp_path / "torn" / "bad" / "adapter_model.safetensors").write_bytes(b"")
    write_folder(adapters[0], tmp_path / "lora")
    (tmp_path / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "empty").mkdir()
    return tmp_path


def test_entries_are_files_folders_and_folders_of_folders(folder, adapters):
    entries = [f"{folder}/many", f"acme/x={folder}/one.safetensors", f"{folder}/three.safetensors",
               f"{folder}/v1.5", f"y={folder}/My-Adapter_v1"]  # fmt: skip
    entries[1] = f"acme/x={folder}/many/one"
    found = read_given(entries)
    assert [given.name for given in found] == ["one", "two", "acme/x", "three", "v1.5", "y"]
    assert found[3].safetensors == to_bytes(adapters[2])


def test_the_zoo_is_given_by_its_name():
    names = [given.name for given in read_given(["zoo"])]
    assert names == sorted(path.parent.name for path in zoo_folder().glob("*/README.md"))


MISTAKES = {
    "missing": (["{}/nowhere"], "{}/nowhere", "PATH or NAME=PATH"),
    "missing, named": (["x={}/nowhere"], "{}/nowhere", "PATH or NAME=PATH"),
    "hub id": (["acme/My-Adapter"], "acme/My-Adapter", "of this machine"),
    "empty folder": (["{}/empty"], "{}/empty", "has no adapter"),
    "no name": (["{}/My-Adapter_v1"], "{}/My-Adapter_v1", "--adapters my-adapter_v1={}/My-Adapter"),
    "bad name": (["Mine={}/many/one"], "{}/many/one", "--adapters mine={}/many/one"),
    "one name twice": (["{}/many", "{}/other"], "{}/many/one and {}/other/one", "'one'"),
    "one entry twice": (["{}/many/one"] * 2, "{}/many/one", "NAME={}/many/one"),
    "zoo twice": (["zoo", "zoo"], "zoo/assistant-json", "NAME="),
    "a name of the zoo": (["zoo", "pirate={}/many/one"], "{}/many/one", "'pirate'"),
    "cut": (["{}/cut.safetensors"], "{}/cut.safetensors", "the file is cut"),
    "one of many": (["{}/torn"], "{}/torn/bad", "0 bytes"),
    "another kind": (["{}/lora"], "{}/lora", "peft_type is 'LORA'; it has to be \"RED\""),
}


@pytest.mark.parametrize("case", MISTAKES)
async def test_a_mistake_is_told_before_the_model_loads(case, folder, monkeypatch):
    entries, *texts = MISTAKES[case]
    monkeypatch.setattr(redmux_server.app, "load", None)
    config = ServerConfig(adapters=tuple(entry.format(folder) for entry in entries))
    with pytest.raises(InvalidArgumentError) as caught:
        await redmux_server.app.Server.start(config)
    assert caught.value.message.startswith("adapters: ")
    for text in texts:
        assert text.format(folder, folder) in caught.value.message


def test_what_does_not_fit_the_base_model_is_named_too(tmp_path, open_registry, make_adapter):
    for name, adapter, error in [
        ("stranger", make_adapter(0, "other-base"), WrongBaseError),
        ("wide", make_adapter(0, sites={"model.layers.0.mlp.down_proj": 5}), InvalidAdapterError),
    ]:
        write_folder(adapter, tmp_path / name)
        with pytest.raises(error, match=f"adapters: {tmp_path / name}: "):
            open_registry().load(*read_given([str(tmp_path / name)]))
