"""API keys: checked and read as operators give them, and what callers bring compared to them.

No message repeats a key.
"""

import functools
import hashlib
import hmac
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from redmux.errors import InvalidArgumentError, UnauthenticatedError

if TYPE_CHECKING:
    from redmux_server.config import ServerConfig

MIN_CHARACTERS = 8
ADMIN = "admin"  # the tenant of the admin key


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


class ApiKeys:
    """The keys that are let in; none lets everybody in."""

    def __init__(self, keys: Sequence[str], admin_key: str = "") -> None:
        """`admin_key` is let in, too, if it is not empty."""
        self._admin_digests = [_digest(admin_key)] if admin_key else []
        self.set(keys)

    def set(self, keys: Sequence[str]) -> None:
        """Lets in these keys from here on, beside the admin's; calls that are running go on."""
        self._digests = [*self._admin_digests, *map(_digest, keys)]

    def tenant(self, authorization: str) -> str:
        """Returns a name for a caller's key, `ADMIN` for the admin key, "" where none is needed.

        `authorization` is what the caller's header of that name says, "" if there is none. The same
        key has the same name in every run. Raises UnauthenticatedError for a missing or unknown
        key.
        """
        if not self._digests:
            return ""
        kind, _, key = authorization.partition(" ")
        digest = _digest(key)
        known = [hmac.compare_digest(digest, other) for other in self._digests]
        if kind.lower() != "bearer" or not any(known):
            raise UnauthenticatedError("missing or unknown API key")
        return ADMIN if digest in self._admin_digests else _tenant(digest)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


@functools.lru_cache(maxsize=4096)
def _tenant(digest: bytes) -> str:
    """Returns the name of a key that is let in; takes milliseconds, once for each.

    It is written to disk as the owner of adapters, so trying out keys against it has to be dear.
    """
    name = hashlib.scrypt(digest, salt=b"redmux tenant", n=1 << 12, r=8, p=1, dklen=16)
    return f"key-{name.hex()}"
