"""Metadata that callers give to things, for themselves."""

from collections.abc import Mapping
from typing import Annotated

from pydantic import AfterValidator

_MOST_PAIRS, _MOST_KEY_CHARS, _MOST_VALUE_CHARS = 16, 64, 512


def _check(given: Mapping[str, str]) -> Mapping[str, str]:
    fits = len(given) <= _MOST_PAIRS and all(
        len(key) <= _MOST_KEY_CHARS and len(value) <= _MOST_VALUE_CHARS
        for key, value in given.items()
    )
    if not fits:
        raise ValueError(
            f"metadata has at most {_MOST_PAIRS} pairs, of {_MOST_KEY_CHARS} and "
            f"{_MOST_VALUE_CHARS} characters"
        )
    return given


Metadata = Annotated[dict[str, str], AfterValidator(_check)]
