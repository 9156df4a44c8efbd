"""The four forms of a prompt: a text, token ids, or a list of either."""

from typing import Annotated, Any

from pydantic import PlainValidator, WithJsonSchema

MAX_PROMPTS = 256
_SHAPE = "must be a text, a list of token ids, or a list of texts or of lists of token ids"

OnePrompt = str | list[int]


def _prompts(given: Any) -> list[OnePrompt]:
    if isinstance(given, str):
        return [given]
    if not isinstance(given, list):
        raise ValueError(f"prompt {_SHAPE}")
    if not given:
        raise ValueError("prompt is an empty list; give at least one")
    kinds = set(map(type, given))
    if kinds == {int}:
        return [given]
    if len(given) > MAX_PROMPTS:
        raise ValueError(f"prompt has {len(given)} prompts; limit {MAX_PROMPTS}")
    if kinds == {str}:
        return given
    if kinds == {list} and all(set(map(type, ids)) <= {int} for ids in given):
        return given
    raise ValueError(f"prompt {_SHAPE}")


_IDS = {"type": "array", "items": {"type": "integer"}, "minItems": 1}
_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        _IDS,
        {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_PROMPTS},
        {"type": "array", "items": _IDS, "minItems": 1, "maxItems": MAX_PROMPTS},
    ]
}
Prompts = Annotated[list[OnePrompt], PlainValidator(_prompts), WithJsonSchema(_SCHEMA)]
