"""What a completion has to look like: keyword arguments into a message."""

import json
from collections.abc import Mapping
from typing import Any

from redmux._arguments import put
from redmux.errors import InvalidArgumentError
from redmux.v1 import inference_service_pb2 as inference_pb2

NAMES = ("schema", "json_object", "regex", "choices", "grammar")


def grammar(options: dict[str, Any]) -> inference_pb2.Grammar | None:
    """Takes the arguments of structured output out of `options` and returns their message.

    Raises InvalidArgumentError, which names the argument, for what no message can hold, and for
    several of them at once.
    """
    given = {name: options.pop(name, None) for name in NAMES}
    given = {name: value for name, value in given.items() if value not in (None, False)}
    if not given:
        return None
    if len(given) > 1:
        raise InvalidArgumentError(f"{' and '.join(given)} exclude each other; give one")
    ((name, value),) = given.items()
    message = inference_pb2.Grammar()
    if name == "schema":
        put(message, "json_schema", _schema_text(value), name)
    elif name == "choices":
        if isinstance(value, str):
            raise InvalidArgumentError(f"choices is a list of texts; write choices=[{value!r}]")
        message.choices.SetInParent()
        put(message.choices, "texts", value, name)
    else:
        put(message, "lark" if name == "grammar" else name, value, name)
    return message


def _schema_text(schema: Any) -> str:
    if isinstance(schema, str):
        return schema
    if hasattr(schema, "model_json_schema"):
        schema = schema.model_json_schema()
    if not isinstance(schema, Mapping):
        raise InvalidArgumentError(
            f"schema is {schema!r}, must be a JSON schema: a mapping, its JSON text or a pydantic "
            "model"
        )
    try:
        return json.dumps(schema, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as err:
        raise InvalidArgumentError(f"schema cannot be written as JSON: {err}") from None
