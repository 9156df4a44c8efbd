"""adapter_config.json: what an adapter says about itself beside its vectors."""

import json
import re
from dataclasses import dataclass, field, fields
from typing import Any

from redmux.errors import InvalidAdapterError

from .head import HeadConfig
from .prompt import PromptFormat
from .strictjson import parse_json, require_text, shown
from .window import ALL, check_apply

PEFT_TYPE = "RED"
CONFIG_NAME = "adapter_config.json"
MAX_TEXT_CHARS = 4096
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # but newline and tab
_MAX_FINGERPRINT_CHARS = 160
_FINGERPRINT_CHARS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")


@dataclass(frozen=True)
class AdapterMetadata:
    """Plain strings for people; none of them changes what the adapter computes.

    Each has at most 4096 characters and no control characters but newline and tab, else
    construction raises InvalidAdapterError.
    """

    base_model_name_or_path: str = ""
    description: str = ""
    license: str = ""
    created_by: str = ""
    created_at: str = ""
    training_data: str = ""
    training: str = ""
    evaluation: str = ""

    def __post_init__(self) -> None:
        for key in _METADATA_KEYS:
            text = require_text(getattr(self, key), key, MAX_TEXT_CHARS)
            found = _CONTROL.search(text)
            if found is not None:
                raise InvalidAdapterError(
                    f"{key} has the control character {shown(found[0])} at index {found.start()}"
                )


_METADATA_KEYS = tuple(item.name for item in fields(AdapterMetadata))


@dataclass(frozen=True)
class AdapterConfig:
    """The content of adapter_config.json."""

    base_fingerprint: str
    prompt_format: PromptFormat | None = None
    metadata: AdapterMetadata = field(default_factory=AdapterMetadata)
    head: HeadConfig | None = None
    apply: str = ALL  # which tokens are edited, see `check_apply`

    def __post_init__(self) -> None:
        check_apply(self.apply)
        name = require_text(self.base_fingerprint, "base_fingerprint", _MAX_FINGERPRINT_CHARS)
        if not name or not _FINGERPRINT_CHARS.issuperset(name):
            raise InvalidAdapterError(
                f"base_fingerprint is {shown(name)}; it has to be 1 to {_MAX_FINGERPRINT_CHARS} of "
                "A-Z a-z 0-9 . _ -, as printed by `redmux adapters show`"
            )


_KEYS = ("peft_type", "base_fingerprint", "prompt_format", "head", "apply", *_METADATA_KEYS)


def parse_config(text: str) -> AdapterConfig:
    """Returns what the text of an adapter_config.json says, or raises InvalidAdapterError."""
    value = parse_json(text, CONFIG_NAME)
    if not isinstance(value, dict):
        raise InvalidAdapterError(f"{CONFIG_NAME} is {shown(value)}; it has to be an object")
    for key in value:
        if key not in _KEYS:
            raise InvalidAdapterError(
                f"unknown key {shown(key)} in {CONFIG_NAME}; known: {', '.join(_KEYS)}"
            )
    if value.get("peft_type") != PEFT_TYPE:
        found = shown(value["peft_type"]) if "peft_type" in value else "missing"
        raise InvalidAdapterError(f'peft_type is {found}; it has to be "{PEFT_TYPE}"')
    if "base_fingerprint" not in value:
        raise InvalidAdapterError(
            f"{CONFIG_NAME} lacks base_fingerprint; it names the base model that the adapter was "
            "trained on"
        )
    prompt_format = None
    if "prompt_format" in value:
        prompt_format = PromptFormat.from_json(value["prompt_format"])
    metadata = AdapterMetadata(**{key: value[key] for key in _METADATA_KEYS if key in value})
    head = HeadConfig.from_json(value["head"]) if "head" in value else None
    apply = value.get("apply", ALL)
    return AdapterConfig(value["base_fingerprint"], prompt_format, metadata, head, apply)


def config_value(config: AdapterConfig) -> dict[str, Any]:
    """Returns the JSON object of adapter_config.json."""
    value: dict[str, Any] = {
        "peft_type": PEFT_TYPE,
        "base_fingerprint": config.base_fingerprint,
    }
    if config.prompt_format is not None:
        value["prompt_format"] = config.prompt_format.to_json()
    if config.head is not None:
        value["head"] = config.head.to_json()
    if config.apply != ALL:
        value["apply"] = config.apply
    texts = {key: getattr(config.metadata, key) for key in _METADATA_KEYS}
    value.update((key, text) for key, text in texts.items() if text)
    return value


def format_config(config: AdapterConfig) -> str:
    """Returns the text of adapter_config.json; equal configurations give equal text."""
    return json.dumps(config_value(config), indent=2, ensure_ascii=False) + "\n"
