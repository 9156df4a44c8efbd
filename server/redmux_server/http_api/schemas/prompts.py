"""The four forms of a prompt or an input: a text, token ids, or a list of either."""

from typing import Annotated, Any

from pydantic import PlainValidator, WithJsonSchema

MAX_PROMPTS = 256  # of completions
_SHAPE = "must be a text, a list of token ids, or a list of texts or of lists of token ids"

OnePrompt = str | list[int]

_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"type": "string"},
        _IDS,
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
        {"type": "array", "items": _IDS, "minItems": 1},
    ]
}


def one_or_more(given: Any, name: str, most: int | None = None) -> list[OnePrompt]:
    """Returns all prompts of a field; raises ValueError for other forms, and for too many."""
    if isinstance(given, str):
        return [given]
    if not isinstance(given, list):
        raise ValueError(f"{name} {_SHAPE}")
    if not given:
        raise ValueError(f"{name} is an empty list; give at least one")
    kinds = set(map(type, given))
    if kinds == {int}:
        return [given]
    if most is not None and len(given) > most:
        raise ValueError(f"{name} has {len(given)} prompts; limit {most}")
    if kinds == {str}:
        return given
    if kinds == {list} and all(set(map(type, ids)) <= {int} for ids in given):
        return given
    raise ValueError(f"{name} {_SHAPE}")


Prompts = Annotated[
    list[OnePrompt],
    PlainValidator(lambda given: one_or_more(given, "prompt", MAX_PROMPTS)),
    WithJsonSchema(SCHEMA),
]
