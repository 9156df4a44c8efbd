"""What the openai package parses: pydantic models, tools with schemas, and vLLM's guides."""

import asyncio
import enum
import json
import re

import jsonschema
import openai
import pydantic
import pytest
import pytest_asyncio
from chat_templates import CALLED, QWEN, RESULT, WEATHER, tokenizer_of
from conftest import load_reference
from tokenizers_at_hand import save_model_with

ASKED = [{"role": "user", "content": "the weather"}]
# The tiny model knows nothing of ends: at this temperature its texts end within its context.
HOT = {"temperature": 1, "seed": 4}


class Sky(enum.Enum):
    CLEAR = "clear"
    GREY = "grey"


class Wind(pydantic.BaseModel):
    knots: int = pydantic.Field(ge=0, le=99)


class Weather(pydantic.BaseModel):
    """A schema with references, an enum, a choice of types and a list."""

    city: str = pydantic.Field(max_length=8)
    sky: Sky
    wind: Wind | None
    days: list[bool] = pydantic.Field(max_length=2)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory):
    """A server whose model's template knows tools."""
    from redmux_server.app import Server
    from redmux_server.config import ServerConfig

    folder = save_model_with(tokenizer_of(QWEN), tmp_path_factory.mktemp("chats"), 2048)
    config = ServerConfig(
        model=str(folder), port=0, http_port=0, metrics_port=0, threads=2, max_running=16,
        served_model_name=("tiny",),
    )  # fmt: skip
    server = await Server.start(config)
    yield server
    await server.stop(drain_s=0)


@pytest.fixture(scope="module")
def base_of_server(server):
    return load_reference(server.config.model)


async def test_a_pydantic_model_is_parsed_out_of_a_chat(api, model):
    asked = {"model": model, "messages": ASKED, **HOT}
    answer = await api.chat.completions.parse(**asked, response_format=Weather)
    (choice,) = answer.choices
    assert choice.finish_reason == "stop"
    assert isinstance(choice.message.parsed, Weather)
    async with api.chat.completions.stream(**asked, response_format=Weather) as stream:
        events = [event async for event in stream]
        final = await stream.get_final_completion()
    assert final.choices[0].message.parsed == choice.message.parsed
    done = next(event for event in events if event.type == "content.done")
    assert done.parsed == choice.message.parsed


async def test_the_synchronous_client_parses_as_well(url, model):
    def ask():
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as sync:
            return sync.chat.completions.parse(
                model=model, messages=ASKED, response_format=Weather, n=3, **HOT
            )

    answer = await asyncio.to_thread(ask)
    parsed = [choice.message.parsed for choice in answer.choices]
    assert all(isinstance(found, Weather) for found in parsed)
    assert len({found.model_dump_json() for found in parsed}) > 1


async def test_what_is_cut_is_told_to_who_parses(api, model):
    with pytest.raises(openai.LengthFinishReasonError):
        await api.chat.completions.parse(
            model=model, messages=ASKED, response_format=Weather, max_tokens=3
        )


async def test_a_pydantic_model_is_parsed_out_of_a_response(api, model):
    asked = {"model": model, "input": "the weather", "text_format": Weather, **HOT}
    extra = {"extra_body": {"seed": asked.pop("seed")}}
    answer = await api.responses.parse(**asked, **extra)
    assert answer.status == "completed"
    assert isinstance(answer.output_parsed, Weather)
    async with api.responses.stream(**asked, **extra) as stream:
        async for _ in stream:
            pass
        final = await stream.get_final_response()
    assert final.output_parsed == answer.output_parsed


async def test_an_adapter_is_parsed_in_its_own_way(api, base_of_server, put, model):
    await put("structured", base_of_server.adapter(2))
    asked = {"messages": ASKED, "response_format": Weather, **HOT}
    plain = await api.chat.completions.parse(model=model, **asked)
    edited = await api.chat.completions.parse(model="structured", **asked)
    assert isinstance(edited.choices[0].message.parsed, Weather)
    assert edited.choices[0].message.parsed != plain.choices[0].message.parsed


SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 3, "maximum": 99}, "b": {"enum": ["x"]}},
    "required": ["a", "b"], "additionalProperties": False,
}  # fmt: skip
LARK = 'start: "<" word ("," word)* ">"\nword: /[a-z]{1,3}/'


def is_json(text):
    jsonschema.validate(json.loads(text), SCHEMA)


def is_hex(text):
    assert re.fullmatch("[a-f]{4}-[0-9]{2}", text)


def is_choice(text):
    assert text in ("alpha", "beta")


def is_list(text):
    assert re.fullmatch("<[a-z]{1,3}(,[a-z]{1,3})*>", text)


def is_object(text):
    assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    ("fields", "check"),
    [
        ({"response_format": {"type": "json_object"}}, is_object),
        (
            {"response_format": {
                "type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA},
            }}, is_json,
        ),
        ({"guided_json": SCHEMA}, is_json),
        ({"guided_json": json.dumps(SCHEMA)}, is_json),
        ({"guided_regex": "[a-f]{4}-[0-9]{2}"}, is_hex),
        ({"guided_choice": ["alpha", "beta"]}, is_choice),
        ({"guided_grammar": LARK}, is_list),
        ({"structured_outputs": {"json": SCHEMA}}, is_json),
        ({"structured_outputs": {"regex": "[a-f]{4}-[0-9]{2}"}}, is_hex),
        ({"structured_outputs": {"choice": ["alpha", "beta"]}}, is_choice),
        ({"structured_outputs": {"grammar": LARK}}, is_list),
        ({"structured_outputs": {"json_object": True}}, is_object),
    ],
    ids=lambda given: getattr(given, "__name__", str(given)),
)  # fmt: skip
async def test_completions_and_chats_have_the_form_that_was_asked_for(api, model, fields, check):
    asked = {"model": model, "n": 4, "extra_body": fields, "max_tokens": 64, **HOT}
    whole = await api.completions.create(prompt="the ", **asked)
    chat = await api.chat.completions.create(messages=ASKED, **asked)
    texts = [c.text for c in whole.choices if c.finish_reason == "stop"]
    texts += [c.message.content for c in chat.choices if c.finish_reason == "stop"]
    assert texts
    for text in texts:
        check(text)
    stream = await api.completions.create(prompt="the ", **asked, stream=True)
    parts = [""] * 4
    async for chunk in stream:
        for choice in chunk.choices:
            parts[choice.index] += choice.text
    assert parts == [choice.text for choice in whole.choices]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"guided_regex": "(?=a)"}, "regex"),
        ({"guided_json": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"guided_json": "{"}, "JSON"),
        ({"guided_grammar": "start: missing"}, "missing"),
        ({"guided_choice": []}, "choice"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos"),
        ({"structured_outputs": {"xml": "a"}}, "structured_outputs.xml"),
    ],
    ids=str,
)
async def test_a_form_that_cannot_be_held_is_refused(api, model, fields, message):
    for create, prompt in (
        (api.completions.create, {"prompt": "a"}),
        (api.chat.completions.create, {"messages": ASKED}),
    ):
        with pytest.raises(openai.BadRequestError, match=message):
            await create(model=model, **prompt, max_tokens=2, extra_body=fields)


class GetWeather(pydantic.BaseModel):
    """Tells the weather."""

    city: Sky
    days: int = pydantic.Field(ge=0, le=9)


async def test_a_call_of_a_tool_is_parsed_as_its_pydantic_model(api, model):
    tool = openai.pydantic_function_tool(GetWeather)
    asked = {"model": model, "messages": ASKED, "tools": [tool], "tool_choice": "required", **HOT}
    answer = await api.chat.completions.parse(**asked)
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    for call in choice.message.tool_calls:
        assert call.function.name == "GetWeather"
        assert isinstance(call.function.parsed_arguments, GetWeather)
    async with api.chat.completions.stream(**asked) as stream:
        kinds = [event.type async for event in stream]
        final = (await stream.get_final_completion()).choices[0]
    assert "tool_calls.function.arguments.done" in kinds
    told = [call.function.arguments for call in final.message.tool_calls]
    assert told == [call.function.arguments for call in choice.message.tool_calls]


async def test_a_named_tool_is_called_and_its_result_taken(api, model):
    named = {"type": "function", "function": {"name": "get_weather"}}
    clock = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}
    asked = {"model": model, "tools": [WEATHER, clock], **HOT}
    answer = await api.chat.completions.create(messages=ASKED, tool_choice=named, **asked)
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "get_weather"
    jsonschema.validate(json.loads(call.function.arguments), WEATHER["function"]["parameters"])
    assert answer.usage.prompt_tokens > 100  # the tools are shown to the model
    said = answer.choices[0].message
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    for turns in ([*ASKED, said, result], [*ASKED, CALLED, RESULT]):
        after = await api.chat.completions.create(messages=turns, max_tokens=4, **asked)
        assert after.usage.prompt_tokens > answer.usage.prompt_tokens
        hidden = await api.chat.completions.create(
            messages=turns, tool_choice="none", max_tokens=4, **asked
        )
        assert hidden.choices[0].message.tool_calls is None
        assert hidden.usage.prompt_tokens < after.usage.prompt_tokens
