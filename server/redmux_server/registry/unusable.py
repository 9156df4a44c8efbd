"""Unusable: a file in the place of an adapter that cannot be served."""

from dataclasses import dataclass
from pathlib import Path

from redmux.errors import RedmuxError


@dataclass(frozen=True, slots=True)
class Unusable:
    """It stays for a person to look at, or until it is replaced."""

    name: str
    path: Path
    owner: str | None  # None where it does not tell
    error: RedmuxError  # for whoever asks for the name

    def fresh_error(self) -> RedmuxError:
        """Returns the error, to be raised once."""
        return type(self.error)(self.error.message)
