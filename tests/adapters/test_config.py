import json

import pytest

from redmux.errors import InvalidAdapterError
from redmux_adapters import AdapterMetadata, PromptFormat, Turn
from redmux_adapters.format.config import AdapterConfig, format_config, parse_config

FULL = AdapterConfig(
    "llama-4x2-0",
    PromptFormat(Turn("a", "b"), Turn("c", "\u00e9")),
    AdapterMetadata("m", 'd \u00e9\n\t"', "MIT", "me", "2026-01-01", "set", "steps", "good"),
    apply="after:<a>",
)


def text(**changes):
    value = {"peft_type": "RED", "base_fingerprint": "b", **changes}
    return json.dumps({key: item for key, item in value.items() if item is not ...})


def test_every_field_round_trips():
    assert parse_config(format_config(FULL)) == FULL


def test_absent_fields_are_left_out():
    bare = AdapterConfig("b")
    assert json.loads(format_config(bare)) == {"peft_type": "RED", "base_fingerprint": "b"}
    assert parse_config(text()) == bare


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("", "not valid JSON"),
        ("[]", r"is \[\]; it has to be an object"),
        ("{" * 100_000, "not valid JSON"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("\ufeff{}", "not valid JSON"),
        (text(peft_type=...), 'peft_type is missing; it has to be "RED"'),
        (text(peft_type="LORA"), "peft_type is 'LORA'"),
        (text(base_fingerprint=...), "lacks base_fingerprint"),
        (text(base_fingerprint="a/b"), "base_fingerprint is 'a/b'"),
        (text(base_fingerprint=7), "base_fingerprint is 7"),
        (text(r=8), "unknown key 'r' in adapter_config.json; known: peft_type, base_fing"),
        (text(description=1), "description is 1"),
        (text(description=None), "description is None"),
        (text(description="x" * 4097), "description has 4097 characters; limit 4096"),
        (text(license="\x1b[2J"), r"license has the control character '\\x1b' at index 0"),
        (text(license="\x85"), "control character"),
        (text(license="\ud800"), "lone surrogate"),
        (text(prompt_format=None), "prompt_format is None"),
        (text(apply="late"), 'apply is \'late\'; it has to be "all", "prompt",'),
        (text(apply="after:"), "apply is 'after:'; it has to be"),
        (text(apply=None), "apply is None"),
        ('{"peft_type": "RED", "peft_type": "RED"}', "duplicate key 'peft_type'"),
        ('{"peft_type": {"a": 1, "a": 2}}', "duplicate key 'a'"),
        ('{"peft_type": NaN}', "NaN is not JSON"),
        ('{"peft_type": %s}' % ("9" * 100_000), "a number of 100000 digits"),
    ],
)
def test_malformed_configuration_is_refused(source, error):
    with pytest.raises(InvalidAdapterError, match=error):
        parse_config(source)
