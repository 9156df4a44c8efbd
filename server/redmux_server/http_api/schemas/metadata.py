"""Metadata that callers give to things, for themselves."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

_MOST_PAIRS, _MOST_KEY_CHARS, _MOST_VALUE_CHARS = 16, 64, 512


_BOUNDS = (
    f"metadata has at most {_MOST_PAIRS} pairs, of {_MOST_KEY_CHARS} and {_MOST_VALUE_CHARS} "
    "characters"
)


def _count(given: Any) -> Any:
    if isinstance(given, dict) and len(given) > _MOST_PAIRS:
        raise ValueError(_BOUNDS)
    return given


def _check(given: Mapping[str, str]) -> Mapping[str, str]:
    for key, value in given.items():
        if len(key) > _MOST_KEY_CHARS or len(value) > _MOST_VALUE_CHARS:
            raise ValueError(_BOUNDS)
    return given


Metadata = Annotated[dict[str, str], BeforeValidator(_count), AfterValidator(_check)]
