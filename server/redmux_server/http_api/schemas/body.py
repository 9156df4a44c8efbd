"""Body: fields that are served, fields without effect, and fields that are refused by name."""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic.json_schema import JsonSchemaValue

from redmux_server.http_api.errors import Refusal

Unserved = Mapping[str, tuple[tuple[Any, ...], str]]  # values that ask for nothing; the reason


def _with_others(schema: JsonSchemaValue, cls: type[Any]) -> None:
    """Adds to a schema what is accepted without effect."""
    for name in sorted(cls.no_effect):
        schema["properties"][name] = {"description": "Accepted without effect."}


class Body(BaseModel):
    """The body of a request; null is as if a field was left out, and nothing is converted."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra=_with_others)
    no_effect: ClassVar[frozenset[str]] = frozenset()
    unserved: ClassVar[Unserved] = {}

    @model_validator(mode="before")
    @classmethod
    def _served(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kept = {}
        for name, value in data.items():
            if value is None or name in cls.no_effect:
                continue
            if name in cls.unserved:
                neutral, reason = cls.unserved[name]
                if value in neutral:
                    continue
                raise Refusal(
                    f"{name} is not served: {reason}", param=name, code="unsupported_parameter"
                )
            kept[name] = value
        return kept
