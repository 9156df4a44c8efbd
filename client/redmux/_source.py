"""Reads what `adapters.put` is given: bytes, a file or a folder."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

from redmux.errors import InvalidArgumentError

AdapterSource: TypeAlias = bytes | str | os.PathLike[str]
AdapterConfig: TypeAlias = str | Mapping[str, object]

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"


def read_source(source: AdapterSource, config: AdapterConfig | None) -> tuple[bytes, str]:
    """Returns the safetensors bytes and the configuration's JSON text, "" where there is none.

    `config`, a mapping or JSON text, takes the place of a folder's own. Raises OSError for what
    cannot be read.
    """
    if config is not None and not isinstance(config, str | Mapping):
        raise InvalidArgumentError(f"config is a mapping or JSON text, not {type(config).__name__}")
    config_json = config if isinstance(config, str) else _dump(config)
    if isinstance(source, bytes):
        return source, config_json
    if not isinstance(source, str | os.PathLike):
        raise InvalidArgumentError(
            f"an adapter's source is bytes or a path, not {type(source).__name__}"
        )
    path = Path(source)
    if path.is_dir():
        if config is None:
            config_json = (path / CONFIG_NAME).read_text(encoding="utf-8")
        return (path / WEIGHTS_NAME).read_bytes(), config_json
    if path.suffix != ".safetensors":
        raise InvalidArgumentError(
            f"'{path}' is neither a folder nor a .safetensors file; "
            "`redmux adapters convert` makes one from other checkpoints"
        )
    return path.read_bytes(), config_json


def _dump(config: Mapping[str, object] | None) -> str:
    if config is None:
        return ""
    try:
        return json.dumps(dict(config), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(f"config cannot be written as JSON: {error}") from None
