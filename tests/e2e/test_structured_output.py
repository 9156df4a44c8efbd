"""Structured output through a real server: every way of asking, errors, and company."""

import asyncio
import json
import re

import jsonschema
import pytest

from redmux import FailedPreconditionError, InvalidArgumentError
from redmux.v1 import inference_service_pb2 as inference_pb

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 3, "maximum": 99}, "b": {"enum": ["x", "y"]},
                   "c": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}},
    "required": ["a", "b", "c"], "additionalProperties": False,
}  # fmt: skip
WAYS = [
    {"schema": SCHEMA},
    {"json_object": True},
    {"regex": "[a-f]{4}-[0-9]{2}"},
    {"choices": ["alpha", "beta", "alphabet"]},
    {"grammar": 'start: "<" word ("," word)* ">"\nword: /[a-z]{1,3}/'},
]
# The tiny model knows nothing of ends: so that a text ends within its context.
HOT = {"temperature": 1.0, "max_tokens": 200}


def holds(way, text):
    if "schema" in way:
        jsonschema.validate(json.loads(text), SCHEMA)
        assert json.dumps(json.loads(text)) == text
    elif "json_object" in way:
        assert isinstance(json.loads(text), dict)
    elif "choices" in way:
        assert text in way["choices"]
    else:
        assert re.fullmatch(way.get("regex", "<[a-z]{1,3}(,[a-z]{1,3})*>"), text)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: next(iter(way)))
async def test_a_finished_completion_is_a_text_of_its_grammar(client, way):
    num_finished = 0
    for seed in range(6):
        found = await client.generate("Hi", **way, **HOT, seed=seed)
        assert found.stop is None
        if found.finish_reason == "stop":
            holds(way, found.text)
            num_finished += 1
    assert num_finished
    greedy = await client.generate("Hi", **way, max_tokens=200)
    if greedy.finish_reason == "stop":
        holds(way, greedy.text)


async def test_a_stream_gives_the_same_text_as_the_whole(client):
    whole = await client.generate("Hi", schema=SCHEMA, **HOT, seed=1)
    chunks = [chunk async for chunk in client.stream("Hi", schema=SCHEMA, **HOT, seed=1)]
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert chunks[-1].finish_reason == whole.finish_reason == "stop"


async def test_a_complete_text_ends_without_another_token(client):
    found = await client.generate("Hi", choices=["alpha"], logprobs=True)
    assert (found.text, found.finish_reason) == ("alpha", "stop")
    assert len(found.token_ids) == len("alpha") == len(found.logprobs)


async def test_one_cut_by_max_tokens_says_length(client):
    found = await client.generate("Hi", regex="a{30}", max_tokens=7)
    assert (found.text, found.finish_reason) == ("a" * 7, "length")
    found = await client.generate("Hi", regex="a{7}", max_tokens=7)
    assert found.finish_reason == "stop"


async def test_a_stop_text_cuts_and_says_so(client):
    found = await client.generate("Hi", regex="a{30}", stop=["aaa"])
    assert (found.text, found.finish_reason, found.stop) == ("", "stop", "aaa")


async def test_rows_have_the_same_bits_alone_and_in_any_company(server, client, base, put):
    assert (await server.info()).bit_identical
    await put("one", base.adapter(1))
    work = [
        {"prompt": f"Prompt {i}", "adapter": "one" if i % 3 else None, "seed": i,
         "temperature": 0.8 * (i % 2), "max_tokens": 24, "logprobs": True, **way}
        for i, way in enumerate([*WAYS, {}, {}, {}, {}])
    ]  # fmt: skip
    alone = [await client.generate(**options) for options in work]
    mixed = await asyncio.gather(*(client.generate(**options) for options in work * 2))
    assert mixed == alone * 2


async def test_log_probabilities_are_those_of_the_model_without_the_grammar(client):
    free = await client.generate("Hi", max_tokens=1, logprobs=True)
    held = await client.generate("Hi", choices=[free.text, "#"], logprobs=True)
    assert held.token_ids[0] == free.token_ids[0]
    assert held.logprobs[0] == free.logprobs[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schema": {"uniqueItems": True}}, r'Unimplemented keys: \["uniqueItems"\]'),
        ({"regex": "(?=a)b"}, "regex: look-around"),
        ({"grammar": "start: foo"}, 'lark: at 1.8.: unknown name: "foo"'),
        ({"choices": []}, "the list of choices is empty"),
        ({"choices": ["a"] * 5001}, "5001 choices; limit 5000"),
        ({"regex": "a" * 70_000}, "regex has 70000 bytes; limit 65536"),
        ({"regex": "a", "ignore_eos": True}, "ignore_eos goes on behind the end"),
    ],
)  # fmt: skip
async def test_what_cannot_be_served_is_refused_before_it_is_queued(
    server, client, options, message
):
    with pytest.raises(InvalidArgumentError, match=message):
        await client.generate("Hi", **options)
    assert server.engine.num_open == 0
    assert (await client.generate("Hi", max_tokens=1)).finish_reason == "length"


async def test_a_grammar_of_no_kind_is_refused(client):
    request = inference_pb.CompleteRequest(
        generation=inference_pb.Generation(text="Hi", grammar=inference_pb.Grammar())
    )
    with pytest.raises(InvalidArgumentError, match="the grammar is empty; set json_schema"):
        await client._connection.unary(client._connection.inference.Complete, request)


async def test_a_model_without_a_fitting_tokenizer_says_why(start_server, monkeypatch):
    from redmux import AsyncClient
    from redmux_server.models.text import TextCodec

    monkeypatch.setattr(TextCodec, "tokenizer_json", lambda self: None)
    server = await start_server()
    async with AsyncClient(f"127.0.0.1:{server.port}") as client:
        with pytest.raises(FailedPreconditionError, match="none of the tokenizers library"):
            await client.generate("Hi", json_object=True)
        assert (await client.generate("Hi", max_tokens=1)).finish_reason == "length"


async def test_each_of_several_choices_follows_the_grammar_on_its_own(client):
    found = await client.generate("Hi", regex="[a-f]{4}-[0-9]{2}", n=5, **HOT, seed=3)
    texts = [choice.text for choice in found.choices]
    assert len(set(texts)) > 1
    for text, choice in zip(texts, found.choices, strict=True):
        assert re.fullmatch("[a-f]{4}-[0-9]{2}", text)
        assert (choice.finish_reason, choice.stop, choice.stop_token_id) == ("stop", None, None)


async def test_other_options_work_on_what_the_grammar_leaves(client):
    found = await client.generate("Hi", regex="[ab]{12}", repetition_penalty=1.3, min_p=0.1)
    assert set(found.text) <= {"a", "b"}


async def test_options_that_leave_nothing_of_a_grammar_end_the_request_with_the_reason(client):
    with pytest.raises(FailedPreconditionError, match="the grammar and the options leave no token"):
        await client.generate("Hi", choices=["b"], allowed_token_ids=[5])
