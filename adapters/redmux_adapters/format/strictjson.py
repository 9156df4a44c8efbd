"""JSON from strangers, parsed so that no two readers can understand it differently."""

import json
import re
from typing import Any

from redmux.errors import InvalidAdapterError

_SURROGATE = re.compile("[\ud800-\udfff]")
_LONGEST_SHOWN = 80
_LONGEST_NUMBER = 20  # digits of 2**64; int() of longer ones takes quadratic time


def parse_json(text: str | bytes, what: str) -> Any:
    """Returns the value of `text`, where `what` names it in error messages.

    Raises InvalidAdapterError for anything that is not strict UTF-8 JSON, for keys that occur
    twice in one object at any level, for NaN and Infinity, for numbers of more than 20 characters
    and for nesting that exhausts the stack.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        return json.loads(
            text,
            object_pairs_hook=lambda pairs: _unique(pairs, what),
            parse_constant=_refuse_constant,
            parse_int=_short_int,
        )
    except UnicodeDecodeError as err:
        raise InvalidAdapterError(f"{what} is not UTF-8: bad byte at {err.start}") from None
    except RecursionError:
        raise InvalidAdapterError(f"{what} is nested too deeply") from None
    except ValueError as err:
        raise InvalidAdapterError(f"{what} is not valid JSON: {err}") from None


def shown(value: object) -> str:
    """Returns `value` for an error message: in quotes, ASCII, one line, at most 80 characters."""
    if isinstance(value, str):
        value = value[:_LONGEST_SHOWN]
    text = ascii(value)
    return text if len(text) <= _LONGEST_SHOWN else text[: _LONGEST_SHOWN - 3] + "..."


def require_text(value: object, what: str, max_chars: int) -> str:
    """Returns `value` if it is a string that UTF-8 can hold, of at most `max_chars` characters."""
    if not isinstance(value, str):
        raise InvalidAdapterError(f"{what} is {shown(value)}; it has to be a string")
    if len(value) > max_chars:
        raise InvalidAdapterError(f"{what} has {len(value)} characters; limit {max_chars}")
    if _SURROGATE.search(value):
        raise InvalidAdapterError(f"{what} holds a lone surrogate, which UTF-8 cannot encode")
    return value


def _unique(pairs: list[tuple[str, Any]], what: str) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise InvalidAdapterError(f"duplicate key {shown(key)} in {what}")
            seen.add(key)
    return result


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _short_int(digits: str) -> int:
    if len(digits) > _LONGEST_NUMBER:
        raise ValueError(f"a number of {len(digits)} digits; limit {_LONGEST_NUMBER}")
    if digits == "-0":
        raise ValueError("-0 is no integer to every reader")
    return int(digits)
