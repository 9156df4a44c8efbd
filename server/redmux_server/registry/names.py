"""What may be the name of an adapter: one that is a path inside a folder, too."""

import re
import secrets

from redmux.errors import InvalidArgumentError

SUFFIX = ".safetensors"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}(/[a-z0-9][a-z0-9._-]{0,63})?")


def check_name(name: str) -> str:
    """Returns the name, or raises InvalidArgumentError if it is none."""
    # A first part that ends like a file would be a folder where another adapter's file goes.
    if not _NAME.fullmatch(name) or f"{SUFFIX}/" in name:
        raise InvalidArgumentError(
            f"adapter name {name[:80]!r} is not valid: one or two parts joined by '/', each of "
            f"a-z, 0-9, '.', '_', '-', at most 64 long, starting with a letter or digit, "
            f"the first of two not ending in {SUFFIX}"
        )
    return name


def spare_name(name: str) -> str:
    """Returns a valid name like this one that is nobody's."""
    team, separator, last = name.rpartition("/")
    return f"{team}{separator}{last[:55]}-{secrets.token_hex(4)}"
