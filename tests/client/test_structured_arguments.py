"""Arguments of structured output: their messages, and what is refused before anything is sent."""

import json

import pydantic
import pytest

import redmux


class Pet(pydantic.BaseModel):
    name: str
    legs: int


def sent(server):
    return server.calls[-1].request.generation


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("options", "kind", "value"),
    [
        ({"schema": SCHEMA}, "json_schema", json.dumps(SCHEMA)),
        ({"schema": json.dumps(SCHEMA)}, "json_schema", json.dumps(SCHEMA)),
        ({"schema": Pet}, "json_schema", json.dumps(Pet.model_json_schema())),
        ({"json_object": True}, "json_object", True),
        ({"regex": "a+"}, "regex", "a+"),
        ({"grammar": 'start: "a"'}, "lark", 'start: "a"'),
    ],
)
def test_each_way_of_saying_it_is_sent(client, server, options, kind, value):
    client.generate("Hi", **options)
    assert sent(server).grammar.WhichOneof("kind") == kind
    assert getattr(sent(server).grammar, kind) == value


def test_choices_are_sent_as_they_are(client, server):
    client.generate("Hi", choices=["a", "\u00e9"])
    assert list(sent(server).grammar.choices.texts) == ["a", "\u00e9"]
    client.generate("Hi", choices=[])  # which the server refuses
    assert sent(server).grammar.WhichOneof("kind") == "choices"


def test_nothing_is_sent_where_nothing_is_wanted(client, server):
    client.generate("Hi", schema=None, json_object=False, regex=None, choices=None, grammar=None)
    assert not sent(server).HasField("grammar")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regex": "a", "choices": ["b"]}, "regex and choices exclude each other; give one"),
        ({"choices": "yes"}, r"choices is a list of texts; write choices=\['yes'\]"),
        ({"choices": [1]}, r"choices\[0\] is 1, must be a text"),
        ({"regex": 3}, "regex is 3, must be a text"),
        ({"grammar": b"\xff"}, "grammar is b'.xff', must be a text"),
        ({"json_object": "yes"}, "json_object is 'yes', must be True or False"),
        ({"schema": [1]}, r"schema is \[1\], must be a JSON schema: a mapping"),
        ({"schema": {"a": {1, 2}}}, "schema cannot be written as JSON: .*not JSON serializable"),
        ({"schema": {"a": float("nan")}}, "schema cannot be written as JSON"),
    ],
)
def test_what_does_not_fit_is_named(client, server, options, message):
    with pytest.raises(redmux.InvalidArgumentError, match=message):
        client.generate("Hi", **options)
    with pytest.raises(redmux.InvalidArgumentError, match=message):
        client.stream("Hi", **options)
    assert server.calls == []
