"""API keys as operators give them: checked, read from a file, never repeated in a message."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from redmux.errors import InvalidArgumentError

if TYPE_CHECKING:
    from redmux_server.config import ServerConfig

MIN_CHARACTERS = 8


def check_keys(keys: Sequence[str], source: str) -> None:
    """Raises InvalidArgumentError for no key at all and for keys that nobody should or can use.

    `source` is what the keys come from, for the message.
    """
    if not any(keys):
        raise InvalidArgumentError(
            f"{source} is set, but holds no key, and without keys everybody would be served; "
            "give keys or leave it out"
        )
    for number, key in enumerate(keys, start=1):
        if not (key.isascii() and key.isprintable()) or " " in key or "," in key:
            raise InvalidArgumentError(
                f"key {number} of {source} has characters that a key cannot have; use printable "
                "ASCII without blanks and commas, one entry for each key"
            )
        if len(key) < MIN_CHARACTERS:
            raise InvalidArgumentError(
                f"key {number} of {source} has {len(key)} characters, must have at least "
                f"{MIN_CHARACTERS}; `openssl rand -hex 16` makes a good one"
            )


def read_keys(config: "ServerConfig") -> tuple[str, ...]:
    """Returns all keys that are let in now: those of the configuration and those of its file.

    Raises InvalidArgumentError for a file that cannot be read or holds what `check_keys` refuses.
    """
    if not config.api_keys_file:
        return config.api_keys
    path = Path(config.api_keys_file)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as err:
        raise InvalidArgumentError(f"cannot read api_keys_file {path}: {err}") from err
    keys = tuple(key for line in lines if (key := line.strip()) and not key.startswith("#"))
    check_keys(keys, str(path))
    return (*config.api_keys, *keys)
