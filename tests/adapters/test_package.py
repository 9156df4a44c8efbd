import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import redmux_adapters
from redmux_adapters import Adapter, AdapterMetadata, Limits, PromptFormat, parse_adapter
from redmux_adapters.format.config import MAX_TEXT_CHARS, parse_config
from redmux_adapters.format.header import MAX_SITE_CHARS, write_container
from redmux_adapters.format.prompt import MAX_TURN_CHARS
from redmux_adapters.format.vectors import MAX_MAGNITUDE

ZOO = Path(redmux_adapters.__file__).parent / "zoo"
DOCUMENT = (Path(__file__).parents[2] / "docs" / "format.md").read_text()


def test_all_is_sorted_and_exists():
    assert redmux_adapters.__all__ == sorted(redmux_adapters.__all__)
    assert all(hasattr(redmux_adapters, name) for name in redmux_adapters.__all__)


@pytest.mark.parametrize(
    "names", ["redmux_adapters", "redmux_adapters.cli, redmux_adapters.convert.worker"]
)
def test_import_leaves_transformers_out(names):
    program = f"import sys, {names}; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_documented_configuration_is_valid():
    text = re.search(r"```json\n(.*?)```", DOCUMENT, re.DOTALL)[1]
    config = parse_config(text)
    assert config.prompt_format == PromptFormat.from_json(json.loads(text)["prompt_format"])
    data = write_container({"model.layers.7.mlp.down_proj.bias": bytes(8)}, {"format": "pt"})
    assert isinstance(parse_adapter(data, text), Adapter)


def test_every_configuration_key_is_documented():
    documented = re.findall(r"^\| `(\w+)` \| (?:required|optional)", DOCUMENT, re.MULTILINE)
    keys = ["peft_type", "base_fingerprint", "prompt_format", "head", "apply"]
    assert documented == keys + [field.name for field in fields(AdapterMetadata)]


def test_every_card_of_the_zoo_tells_the_base_that_its_adapter_is_for():
    cards = sorted(ZOO.glob("*/README.md"))
    assert len(cards) == 7
    for card in cards:
        config = json.loads((card.parent / "adapter_config.json").read_text())
        assert f"fingerprint `{config['base_fingerprint']}`" in card.read_text()


def test_documented_limits_are_the_defaults():
    limits = Limits()
    table = dict(re.findall(r"^\| ([^|`]+|`[^`]+`) \| ([^|]+) \|$", DOCUMENT, re.MULTILINE))
    assert table["file"] == f"{limits.file_bytes >> 20} MiB"
    assert table["safetensors header"] == f"{limits.header_bytes >> 10} KiB"
    assert table["tensors"] == f"{limits.num_tensors:,}"
    assert table["`adapter_config.json`"] == f"{limits.config_bytes >> 10} KiB"
    assert table["module path"] == f"{MAX_SITE_CHARS} characters"
    assert float(table["magnitude of a value"]) == MAX_MAGNITUDE
    assert f"at most {MAX_TEXT_CHARS:,} characters" in DOCUMENT
    assert f"Each string has at most {MAX_TURN_CHARS} characters" in DOCUMENT


def test_limits_can_hold_what_may_be_written():
    full = AdapterMetadata(*['"' * MAX_TEXT_CHARS] * len(fields(AdapterMetadata)))
    turn = ("\x01" * MAX_TURN_CHARS, "\x01" * MAX_TURN_CHARS)
    form = PromptFormat(turn, turn, turn)
    adapter = Adapter.identity({"m": 1}, "b", prompt_format=form, metadata=full)
    assert parse_adapter(redmux_adapters.to_bytes(adapter)) == adapter


def test_a_full_size_red_plus_plus_adapter_of_a_70b_model_fits():
    layer = {"q": 8192, "k": 1024, "v": 1024, "o": 8192, "gate": 28672, "up": 28672, "down": 8192}
    sites = {f"model.layers.{i}.{n}_proj": dim for i in range(80) for n, dim in layer.items()}
    data = redmux_adapters.to_bytes(Adapter.identity(sites, "b"))
    assert len(data) < Limits().file_bytes
    assert torch.equal(parse_adapter(data).edits["model.layers.79.k_proj"].bias, torch.zeros(1024))
