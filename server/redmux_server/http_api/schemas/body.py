"""Body: fields that are served, fields without effect, and fields that are refused by name."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.json_schema import JsonSchemaValue

from redmux_server.http_api.errors import Refusal
from redmux_server.http_api.sent import Sent, first_sent, of_name

Unserved = Mapping[str, tuple[tuple[Any, ...], str]]  # values that ask for nothing; the reason
# Of all that is wrong in a list only the first is told: it may have a million of them.
Ids = Annotated[list[int], Field(fail_fast=True)]
Texts = Annotated[list[str], Field(fail_fast=True)]
Objects = Annotated[list[dict[str, Any]], Field(fail_fast=True)]
_MOST_FIELDS = 256  # of a request; none has as many
_TOLD = frozenset(("title", "description", "default"))  # of a field, whatever it takes


def _complete(schema: JsonSchemaValue, cls: type[Any]) -> None:
    """Adds to a schema what is accepted besides: nulls, and fields that ask for nothing."""
    needed = schema.get("required", ())
    for name, field in schema["properties"].items():
        if name not in needed:
            schema["properties"][name] = _or_null(field)
    for name, (neutral, reason) in sorted(cls.unserved.items()):
        field = {"enum": [*neutral, None], "description": f"Not served: {reason}."}
        schema["properties"].setdefault(name, field)
    for name in sorted(cls.no_effect):
        schema["properties"][name] = {"description": "Accepted without effect."}


def _or_null(field: JsonSchemaValue) -> JsonSchemaValue:
    """Returns the schema of a field that may be null."""
    null = {"type": "null"}
    if null in field.get("anyOf", ()):
        return field
    told = {key: value for key, value in field.items() if key in _TOLD}
    rest = {key: value for key, value in field.items() if key not in told}
    return {"anyOf": [*(rest["anyOf"] if set(rest) == {"anyOf"} else [rest]), null], **told}


def _is_one_of(value: Any, neutral: tuple[Any, ...]) -> bool:
    """Returns whether a value of JSON is one of these; in Python 0 is False, too."""
    return any(type(value) is type(other) and value == other for other in neutral)


class Body(BaseModel):
    """The body of a request; null is as if a field was left out, and nothing is converted."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra=_complete)
    no_effect: ClassVar[frozenset[str]] = frozenset()
    unserved: ClassVar[Unserved] = {}
    # Of fields that services call in another way: how they do, and names here, what goes before
    # first; those with dots are inside of objects.
    aliases: ClassVar[Mapping[str, Sequence[str]]] = {}

    @classmethod
    def sent(cls, given: Any) -> Sent:
        """Returns the names of a body for the errors about it, valid or not."""
        body = given if isinstance(given, dict) else {}
        return Sent(frozenset((*cls.model_fields, *body)), tuple(cls.renamed(body)))

    @classmethod
    def renamed(cls, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Yields what services call something, and what stands for it in this body."""
        for theirs, names in cls.aliases.items():
            yield of_name(theirs, first_sent(given, names))

    @model_validator(mode="before")
    @classmethod
    def _served(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if len(data) > _MOST_FIELDS:
            raise Refusal(f"the request has {len(data)} fields; limit {_MOST_FIELDS}", param=None)
        kept = {}
        for name, value in data.items():
            if value is None or name in cls.no_effect:
                continue
            if name in cls.unserved:
                neutral, reason = cls.unserved[name]
                if _is_one_of(value, neutral):
                    continue
                raise Refusal(
                    f"{name} is not served: {reason}", param=name, code="unsupported_parameter"
                )
            kept[name] = value
        return kept
