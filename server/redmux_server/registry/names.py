"""What may be the name of an adapter or of an alias, and what refers to one version."""

import re
import secrets
from typing import NamedTuple

from redmux.errors import InvalidArgumentError, NotFoundError

SUFFIX = ".safetensors"
LATEST = "latest"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}(/[a-z0-9][a-z0-9._-]{0,63})?")
_ALIAS = re.compile(r"[a-z][a-z0-9._-]{0,63}")
_NUMBER = re.compile(r"[1-9][0-9]{0,8}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{8,64}")
_FULL_DIGEST = 71  # characters


class Reference(NamedTuple):
    """Which adapter is meant: one of the four last is set, none for the newest of a name."""

    name: str  # "" where it is a digest alone, or nothing that there can be
    number: int = 0
    digest: str = ""  # the beginning of one behind a name
    alias: str = ""

    @property
    def is_name(self) -> bool:
        """Whether it says nothing but a name."""
        return not (self.number or self.digest or self.alias)


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


def check_alias(alias: str) -> str:
    """Returns the name of an alias, or raises InvalidArgumentError if it is none."""
    if not _ALIAS.fullmatch(alias) or alias == LATEST:
        raise InvalidArgumentError(
            f"alias {alias[:80]!r} is not valid: a-z, 0-9, '.', '_', '-', at most 64 long, "
            f"starting with a letter, and not {LATEST!r}, which is always the newest version"
        )
    return alias


def parse_reference(text: str) -> Reference:
    """Returns what a name, a digest, or a name and a version behind an '@' refer to.

    Raises NotFoundError for what nothing can be called.
    """
    if len(text) == _FULL_DIGEST and _DIGEST.fullmatch(text):
        return Reference("", digest=text)
    name, separator, version = text.partition("@")
    if _NAME.fullmatch(name):
        if not separator or version == LATEST:
            return Reference(name)
        if _NUMBER.fullmatch(version):
            return Reference(name, number=int(version))
        if _DIGEST.fullmatch(version):
            return Reference(name, digest=version)
        if _ALIAS.fullmatch(version):
            return Reference(name, alias=version)
    if separator:
        raise NotFoundError(
            f"no adapter {text[:160]!r}; behind the name and '@' comes a version's number, "
            f"sha256: and 8 or more digits of its digest, an alias, or {LATEST}"
        )
    return Reference("")  # what is no name is nobody's


def near_name(text: str) -> str:
    """Returns a text without what no name has, to look for names like it."""
    return re.sub(r"[^a-z0-9._/-]", "", text[:160].partition("@")[0].lower())


def spare_name(name: str) -> str:
    """Returns a valid name like this one that is nobody's."""
    team, separator, last = name.rpartition("/")
    return f"{team}{separator}{last[:55]}-{secrets.token_hex(4)}"
