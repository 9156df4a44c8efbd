"""What the bodies of requests ask the services for, field by field."""

import dataclasses
import json

import pytest

from redmux_server.http_api.errors import Refusal
from redmux_server.http_api.schemas.chat import ChatBody
from redmux_server.http_api.schemas.completion import CompletionBody
from redmux_server.http_api.schemas.response import ResponseBody
from redmux_server.services.spec import GenerationSpec, Grammar, GrammarKind

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
FIELDS = {
    "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.05, "typical_p": 0.8,
    "presence_penalty": 0.1, "frequency_penalty": 0.2, "repetition_penalty": 1.1, "n": 2,
    "seed": 7, "min_tokens": 3, "stop_regex": "a+", "ignore_eos": True,
    "skip_special_tokens": False, "priority": -1, "allowed_token_ids": [1], "bad_words": ["x"],
    "bad_token_ids": [2], "stop_token_ids": [3], "max_tokens": 4, "apply": "prompt",
}  # fmt: skip
RENAMED = {
    "no_repeat_ngram_size": (3, "no_repeat_ngram", 3),
    "logit_bias": ({"50": -100, "7": 1.5}, "logit_bias", {50: -100, 7: 1.5}),
    "stop": ("a", "stop", ["a"]),
    "include_stop_str_in_output": (True, "include_stop_str", True),
}


def completion(**fields):
    body = CompletionBody.model_validate({"model": "m", "prompt": "a", **fields})
    return body.spec("a", "x", 9.0)


def test_every_option_reaches_the_services_under_its_name():
    assert completion() == GenerationSpec("a", "x", timeout_s=9.0)
    for name, value in FIELDS.items():
        assert completion(**{name: value}) == GenerationSpec(
            "a", "x", timeout_s=9.0, **{name: value}
        )
    for name, (value, ours, expected) in RENAMED.items():
        assert completion(**{name: value}) == GenerationSpec(
            "a", "x", timeout_s=9.0, **{ours: expected}
        )


def test_every_option_of_the_services_is_one_of_http():
    reached = {*FIELDS, *(ours for _, ours, _ in RENAMED.values())}
    others = {"prompt", "adapter", "grammar", "timeout_s", "logprobs", "top_logprobs",
              "prompt_logprobs"}  # fmt: skip
    assert {field.name for field in dataclasses.fields(GenerationSpec)} == reached | others


@pytest.mark.parametrize(
    ("fields", "kind", "source"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {
            "name": "x", "strict": True, "schema": SCHEMA}}}, "JSON_SCHEMA", SCHEMA),
        ({"response_format": {"type": "json_object"}}, "JSON_OBJECT", ""),
        ({"guided_json": SCHEMA}, "JSON_SCHEMA", SCHEMA),
        ({"guided_json": json.dumps(SCHEMA)}, "JSON_SCHEMA", SCHEMA),
        ({"guided_regex": "a+"}, "REGEX", "a+"),
        ({"guided_choice": ["a", "b"]}, "CHOICE", ["a", "b"]),
        ({"guided_grammar": "start: x"}, "LARK", "start: x"),
        ({"structured_outputs": {"json": SCHEMA}}, "JSON_SCHEMA", SCHEMA),
        ({"structured_outputs": {"regex": "a+"}}, "REGEX", "a+"),
        ({"structured_outputs": {"choice": ["a"]}}, "CHOICE", ["a"]),
        ({"structured_outputs": {"grammar": "start: x"}}, "LARK", "start: x"),
        ({"structured_outputs": {"json_object": True}}, "JSON_OBJECT", ""),
    ],
)  # fmt: skip
def test_what_an_answer_has_to_look_like_is_a_grammar(fields, kind, source):
    grammar = completion(**fields).grammar
    assert grammar.kind is GrammarKind[kind]
    found = grammar.source if isinstance(source, str) else json.loads(grammar.source)
    assert found == source


def test_without_a_wish_there_is_no_grammar():
    for fields in ({"response_format": {"type": "text"}}, {"structured_outputs": {}},
                   {"guided_json": None}):  # fmt: skip
        assert completion(**fields).grammar is None


def test_an_empty_guide_is_still_one():
    assert completion(guided_json={}).grammar == Grammar(GrammarKind.JSON_SCHEMA, "{}")
    assert completion(guided_choice=[]).grammar == Grammar(GrammarKind.CHOICE, "[]")


def test_several_wishes_at_once_are_refused():
    with pytest.raises(Refusal, match="several ways"):
        completion(guided_regex="a", structured_outputs={"regex": "b"})


def test_a_chat_and_a_response_ask_for_the_same():
    turns = [{"role": "user", "content": "a"}]
    body = ChatBody.model_validate({
        "model": "m", "messages": turns, "max_tokens": 3, "max_completion_tokens": 4,
        "logprobs": True, "top_logprobs": 2, "chat_template": "t", "continue_final_message": True,
        "chat_template_kwargs": {"k": 1}, "tools": [{}], "parallel_tool_calls": False,
        "tool_choice": {"type": "function", "function": {"name": "f"}},
    })  # fmt: skip
    outputs = body.outputs()
    assert outputs == {"max_tokens": 4, "logprobs": True, "top_logprobs": 2}
    chat = body.chat()
    assert (chat.template, chat.template_args) == ("t", {"k": 1})
    assert (chat.continue_final_message, chat.add_generation_prompt) == (True, False)
    assert (chat.tools, chat.tool_choice, chat.parallel_tool_calls) == ([{}], "f", False)
    spec = ResponseBody.model_validate({
        "model": "m", "input": "a", "max_output_tokens": 5, "temperature": 0.5, "top_p": 0.5,
        "include": ["message.output_text.logprobs"], "top_logprobs": 1, "instructions": "i",
        "ignore_eos": True,
        "text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}},
    }).spec("x", None)  # fmt: skip
    assert [turn["content"] for turn in spec.prompt.messages] == ["i", "a"]
    assert (spec.max_tokens, spec.temperature, spec.top_p) == (5, 0.5, 0.5)
    assert (spec.logprobs, spec.top_logprobs, spec.ignore_eos) == (True, 1, True)
    assert spec.grammar.kind is GrammarKind.JSON_SCHEMA
    assert json.loads(spec.grammar.source) == SCHEMA
