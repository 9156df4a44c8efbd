"""From the grammars that clients write to the one language that is compiled: Lark."""

import json
import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from llguidance import regex_to_lark

from redmux.errors import InvalidArgumentError
from redmux_server.services.spec import Grammar, GrammarKind

MAX_BYTES = 64 << 10
MAX_DEPTH = 64  # of a schema
MAX_KEYS = 5_000  # of all objects of a schema together
MAX_PROPERTIES = 500  # of one object
MAX_VALUES = 5_000  # of all enums of a schema together; choices
# A number is a multiple of another if an automaton with that many states says so.
MAX_MULTIPLES = 20_000  # digits of all multipleOf of a schema, as whole numbers, together

# All that llguidance reads from a schema beside the standard, so that no client sets any of it:
# nothing is ignored, and whitespace is that of json.dumps, which adapters are trained on.
_OPTIONS = {
    "lenient": False,
    "coerce_one_of": False,
    "whitespace_flexible": False,
    "whitespace_pattern": None,
    "item_separator": ", ",
    "key_separator": ": ",
    "json_allowed_escapes": None,
    "json_allow_general_unicode_escapes": False,
}
# Texts that a grammar forces are otherwise computed ahead, up to its end: a{1000000} takes seconds.
_END = '\n%llguidance {"no_forcing": true}\n'
_LARK_TOKEN = re.compile(
    r"""
      (?P<text> "(?:\\.|[^"\\\n])*" | /(?![/*])(?:\\.|[^/\\\n])+/ | (?://|\#)[^\n]* )
    | (?P<json> %json\s*(?=\{) )
    | (?P<option> %llguidance\b | \btemperature\s*= )
    """,
    re.VERBOSE,
)


def to_lark(grammar: Grammar) -> str:
    """Returns the grammar in Lark, with the server's options.

    Raises InvalidArgumentError for what is beyond the limits or not in its language's form; most
    of what is wrong inside shows when it is compiled.
    """
    try:
        grammar.source.encode()
    except UnicodeEncodeError:
        raise InvalidArgumentError(f"{grammar.kind.value} is no valid Unicode") from None
    return _WRITERS[grammar.kind](grammar.source) + _END


def _of_schema(source: str) -> str:
    try:
        schema = json.loads(source)
    except (ValueError, RecursionError) as err:
        raise InvalidArgumentError(f"json_schema is no JSON: {err}") from None
    return f"start: %json {_schema(schema)}"


def _of_object(_: str) -> str:
    return _of_schema('{"type": "object"}')


def _of_regex(source: str) -> str:
    if (len(source) - len(source.rstrip("\\"))) % 2:
        raise InvalidArgumentError("regex ends with a lone backslash; write \\\\ for one")
    return f"start: /{regex_to_lark(source, 'd')}/"


def _of_choices(source: str) -> str:
    try:
        choices = json.loads(source)
    except (ValueError, RecursionError) as err:
        raise InvalidArgumentError(f"choice is no JSON list of texts: {err}") from None
    if not isinstance(choices, list) or not all(isinstance(text, str) for text in choices):
        raise InvalidArgumentError("choice is no JSON list of texts")
    check_num_choices(len(choices))
    for text in choices:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InvalidArgumentError(f"choice {text!r} is no valid Unicode") from None
    return f"start: CHOICE\nCHOICE: {' | '.join(map(json.dumps, choices))}"


def _of_lark(source: str) -> str:
    return "".join(_with_our_options(source))


_WRITERS = {
    GrammarKind.JSON_SCHEMA: _of_schema,
    GrammarKind.JSON_OBJECT: _of_object,
    GrammarKind.REGEX: _of_regex,
    GrammarKind.CHOICE: _of_choices,
    GrammarKind.LARK: _of_lark,
}


def check_num_choices(number: int) -> None:
    """Raises InvalidArgumentError for no choice, and for more than there may be."""
    if not number:
        raise InvalidArgumentError("the list of choices is empty; give at least one")
    if number > MAX_VALUES:
        raise InvalidArgumentError(f"{number} choices; limit {MAX_VALUES}")


def _with_our_options(source: str) -> Iterator[str]:
    """Yields a Lark grammar part by part, with the server's options in its schemas."""
    done = 0
    while (found := _LARK_TOKEN.search(source, done)) is not None:
        yield source[done : found.end()]
        done = found.end()
        if found["option"]:
            name = found["option"].rstrip(" \t=")
            raise InvalidArgumentError(f"lark: {name} is the server's to set; leave it out")
        if found["json"]:
            try:
                schema, done = json.JSONDecoder().raw_decode(source, done)
            except (ValueError, RecursionError) as err:
                raise InvalidArgumentError(f"lark: %json is followed by no JSON: {err}") from None
            yield _schema(schema)
    yield source[done:]


def _schema(schema: Any) -> str:
    """Returns the text of a schema within the limits, with the server's options."""
    if not isinstance(schema, dict):
        raise InvalidArgumentError(f"the JSON schema is {json.dumps(schema)[:80]}, not an object")
    _check(schema)
    try:
        return json.dumps({**schema, "x-guidance": _OPTIONS}, allow_nan=False)
    except ValueError:
        raise InvalidArgumentError("the JSON schema has a number that JSON has not") from None


def _check(schema: Any) -> None:
    """Raises InvalidArgumentError for a schema that is too large in some way."""
    num_keys = num_values = multiples = 0
    level, depth = [schema], 0
    while level:
        depth += 1
        below: list[Any] = []
        for part in level:
            if isinstance(part, list):
                below += part
                continue
            below += part.values()
            num_keys += len(part)
            if isinstance(properties := part.get("properties"), dict):
                _limit("properties in one object", len(properties), MAX_PROPERTIES)
            if isinstance(values := part.get("enum"), list):
                num_values += len(values)
            multiples += _multiple(part.get("multipleOf"))
            _check_min_properties(part)
        level = [part for part in below if isinstance(part, dict | list)]
        _limit("levels", depth, MAX_DEPTH)
    _limit("keys", num_keys, MAX_KEYS)
    _limit("values in enums", num_values, MAX_VALUES)
    _limit("as the sum of its multipleOf (without decimal point)", multiples, MAX_MULTIPLES)


def _check_min_properties(part: dict[str, Any]) -> None:
    """Refuses what would be counted wrong: keys without a name in the schema may repeat."""
    number, required = part.get("minProperties"), part.get("required")
    num_named = len(required) if isinstance(required, list) else 0
    if isinstance(number, int | float) and number > max(1, num_named):
        raise InvalidArgumentError(
            f"json_schema: minProperties: {number} cannot be held, since keys that the schema does "
            f"not name may repeat; at most {max(1, num_named)} here, as many as are required"
        )


def _limit(what: str, number: int, limit: int) -> None:
    if number > limit:
        raise InvalidArgumentError(f"the JSON schema has {number} {what}; limit {limit}")


def _multiple(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return 0
    decimal = Decimal(repr(value))
    if not decimal.is_finite():
        return 0
    return abs(int("".join(map(str, decimal.normalize().as_tuple().digits))))
