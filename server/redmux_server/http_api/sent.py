"""Sent: the names that a client has sent, where services call the same by other ones."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_QUOTED = re.compile(r"""((?<!\w)'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")""")
_LEADING = re.compile(r"[a-z_]\w*(?:\[\d+\])*(?:\.[a-z_]\w*(?:\[\d+\])*)*(?=:? )")


@dataclass(frozen=True, slots=True)
class Sent:
    """The fields of one request's body, for the errors about it."""

    fields: frozenset[str]
    names: Sequence[tuple[str, str]]  # regular expressions of theirs, in their order; the client's

    def message(self, message: str) -> str:
        """Returns a message in the client's names; what it quotes stays."""
        parts = _QUOTED.split(message)
        for theirs, own in self.names:
            last = 1 if theirs.startswith("^") else len(parts)
            parts[:last:2] = [re.sub(theirs, own, part) for part in parts[:last:2]]
        return "".join(parts)

    def param(self, message: str) -> str | None:
        """Returns the field that a message in the client's names begins with, if it does."""
        found = _LEADING.match(message)
        if found is None or re.split(r"[.\[]", found[0])[0] not in self.fields:
            return None
        return re.sub(r"\[\d+\]", "", found[0])


def of_name(theirs: str, own: str) -> tuple[str, str]:
    """Returns how a field gets the client's name: a plain word only where a field has to be."""
    word = rf"\b{theirs}\b"
    return (word if "_" in theirs else rf"^{theirs}\b(?= (?:is|has|=|holds|must)\b|[\[.:])"), own


def first_sent(given: Mapping[str, object], names: Sequence[str]) -> str:
    """Returns the first of these names, with dots, that a body has, else the first of them."""
    for name in names:
        value: object = given
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None:
            return name
    return names[0]
