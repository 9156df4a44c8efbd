"""What the services call a grammar, for errors about the field that it came in."""

from collections.abc import Iterator


def grammar_names(name: str) -> Iterator[tuple[str, str]]:
    """Yields, for a grammar that came in the field of this name, what it is called; see Sent."""
    yield r"^(?:json_schema|json_object|regex|choice|lark)(?=[: ])", name
    yield r"^the JSON schema\b", name
    yield r"^the list of choices\b", name
    yield r"^(\d+) choices;", rf"{name} has \1 choices;"
    yield r"\ba grammar\b", name
