"""Errors speak of what HTTP has, and name what the client sent."""

import ast
import dataclasses
import re
from pathlib import Path

import pytest

from redmux.errors import InvalidArgumentError
from redmux_server.http_api.errors import body_of
from redmux_server.http_api.schemas import adapters, reading, tokens  # noqa: F401
from redmux_server.http_api.schemas.body import Body
from redmux_server.http_api.schemas.chat import ChatBody
from redmux_server.http_api.schemas.completion import CompletionBody
from redmux_server.http_api.schemas.response import ResponseBody
from redmux_server.services.spec import GenerationSpec

ROOT = Path(__file__).parents[2]


def test_no_error_names_a_call_that_is_not_there_over_http():
    """Messages of the services speak of gRPC's methods."""
    calls = set().union(
        *(
            re.findall(r"rpc (\w+)\(", file.read_text())
            for file in (ROOT / "proto").rglob("*.proto")
        )
    )
    assert len(calls) > 10
    raised = {}
    for file in (ROOT / "server" / "redmux_server").rglob("*.py"):
        if file.parent.name == "grpc_api":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if not (isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Error")):
                continue
            texts = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)]
            message = "".join(text for text in texts if isinstance(text, str))
            if named := calls & set(re.findall(r"\w+", message)):
                raised[message] = named
    assert len(raised) > 4
    for message, named in raised.items():
        told = body_of(InvalidArgumentError(message))["error"]["message"]
        assert not named & set(re.findall(r"\w+", told)), told
        assert not re.search(r"(/[\w/]+) or \1\b", told), told


CHAT = {"messages": [{"role": "user", "content": "hi"}]}
TEXT = {"prompt": "abc"}
COMPLETIONS, CHATS, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
NOT_BOTH = {"type": "object", "properties": {"a": {"not": {}}}, "minProperties": 9}
SCHEMA = {"type": "json_schema", "json_schema": {"schema": NOT_BOTH}}
WRONG = [
    (COMPLETIONS, {**TEXT, "max_tokens": -1}, "max_tokens"),
    (COMPLETIONS, {**TEXT, "no_repeat_ngram_size": -1}, "no_repeat_ngram_size"),
    (COMPLETIONS, {**TEXT, "max_tokens": 999}, "prompt"),
    (COMPLETIONS, {"prompt": [1, 99_999]}, "prompt"),
    (COMPLETIONS, {"prompt": [[1], [99_999]]}, "prompt"),
    (COMPLETIONS, {**TEXT, "guided_json": NOT_BOTH}, "guided_json"),
    (COMPLETIONS, {**TEXT, "guided_json": [1]}, "guided_json"),
    (COMPLETIONS, {**TEXT, "guided_json": "[1]"}, "guided_json"),
    (COMPLETIONS, {**TEXT, "guided_json": "{"}, "guided_json"),
    (COMPLETIONS, {**TEXT, "guided_json": "x" * 99_999}, "guided_json"),
    (COMPLETIONS, {**TEXT, "guided_regex": "(" }, "guided_regex"),
    (COMPLETIONS, {**TEXT, "guided_choice": []}, "guided_choice"),
    (COMPLETIONS, {**TEXT, "guided_choice": ["a"] * 6000}, "guided_choice"),
    (COMPLETIONS, {**TEXT, "guided_grammar": "start"}, "guided_grammar"),
    (COMPLETIONS, {**TEXT, "response_format": SCHEMA}, "response_format.json_schema"),
    (COMPLETIONS, {**TEXT, "structured_outputs": {"json": NOT_BOTH}}, "structured_outputs.json"),
    (COMPLETIONS, {**TEXT, "structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
    (COMPLETIONS, {**TEXT, "structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    (COMPLETIONS, {**TEXT, "structured_outputs": {"grammar": "x"}}, "structured_outputs.grammar"),
    (CHATS, {**CHAT, "max_completion_tokens": 0}, "max_completion_tokens"),
    (CHATS, {**CHAT, "max_completion_tokens": 0, "max_tokens": 5}, "max_completion_tokens"),
    (CHATS, {**CHAT, "max_tokens": 0}, "max_tokens"),
    (CHATS, {**CHAT, "max_completion_tokens": 999}, "messages"),
    (CHATS, {"messages": [{"role": "x", "content": "a"}]}, "messages"),
    (CHATS, {"messages": CHAT["messages"] * 5000}, "messages"),
    (CHATS, {**CHAT, "tools": [{}] * 200}, "tools"),
    (CHATS, {**CHAT, "tools": [{}]}, "tools"),
    (CHATS, {**CHAT, "tool_choice": "x"}, "tool_choice"),
    (CHATS, {**CHAT, "chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs"),
    (CHATS, {**CHAT, "response_format": SCHEMA}, "response_format.json_schema"),
    (RESPONSES, {"input": "hi", "max_output_tokens": 0}, "max_output_tokens"),
    (RESPONSES, {"input": "hi", "max_output_tokens": 999}, "input"),
    (RESPONSES, {"input": [{"role": "x", "content": "a"}]}, "input[0].role"),
    (RESPONSES, {"input": CHAT["messages"] * 5000}, "input"),
    (RESPONSES, {"input": "hi", "text": {"format": {
        "type": "json_schema", "schema": NOT_BOTH}}}, "text.format"),
    ("/v1/embeddings", {"input": "a" * 300}, "input"),
    ("/v1/embeddings", {"input": ["a", "a" * 300]}, "input"),
    ("/v1/embeddings", {"input": [99_999]}, "input"),
    ("/v1/embeddings", {"input": [[1], [99_999]]}, "input"),
    ("/v1/embeddings", {"input": ["a"] * 2000}, "input"),
    ("/score", {"queries": ["a", "b", "c"], "documents": ["a"]}, "queries"),
    ("/score", {"queries": 1, "items": ["a"]}, "queries"),
    ("/score", {"queries": "a", "documents": {}}, "documents"),
    ("/score", {"text_1": "a", "queries": "a", "text_2": "a"}, "queries"),
    ("/detokenize", {"tokens": [99_999]}, "tokens"),
    ("/tokenize", {**CHAT, "chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs"),
    ("/tokenize", {"messages": [{"role": "x"}]}, "messages"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "param"), WRONG)
async def test_an_error_names_the_field_that_was_sent(http, model, path, body, param):
    response = await http.post(path, json={"model": model, **body})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    message = re.sub("^This model's maximum context length is 256 tokens: ", "", error["message"])
    assert message.startswith(param) or message.startswith(f"text_1 and {param}")


async def test_a_field_that_only_services_know_is_refused_as_it_was_sent(http, model):
    """Its name is not changed into that which a field of the same kind has here."""
    for path, body, name in (
        (COMPLETIONS, TEXT, "no_repeat_ngram"), (COMPLETIONS, TEXT, "top_logprobs"),
        (RESPONSES, {"input": "a"}, "max_tokens"), (CHATS, CHAT, "template_args"),
    ):  # fmt: skip
        response = await http.post(path, json={"model": model, **body, name: 1})
        error = response.json()["error"]
        assert error["param"] == name
        assert error["message"].startswith(f"{name} is no field of this request")


def classes():
    left, found = [Body], []
    while left:
        below = left.pop().__subclasses__()
        found += below
        left += below
    return [cls for cls in found if cls.aliases]


@pytest.mark.parametrize("cls", classes(), ids=lambda cls: cls.__name__)
def test_every_name_of_a_field_is_told_when_it_is_the_one_that_was_sent(cls):
    for theirs, names in cls.aliases.items():
        assert theirs not in cls.model_fields or theirs in names
        for name in names:
            assert name in cls.model_fields
            sent = cls.sent({name: 1})
            for said in (f"{theirs} is 1, must be 2", f"{theirs}[3] has 1; limit 2"):
                assert sent.message(said) == said.replace(theirs, name)
                assert sent.param(sent.message(said)) == name
            quoted = f"{theirs} is '{theirs} or it\\'s', must be \"a {theirs}\""
            assert sent.message(quoted) == name + quoted[len(theirs) :]


def test_no_error_of_the_services_names_a_field_that_http_calls_otherwise():
    """What they call otherwise is among the aliases, or given as a Refusal by HTTP itself."""
    bodies = (CompletionBody, ChatBody, ResponseBody)
    ours = {field.name for field in dataclasses.fields(GenerationSpec)}
    for cls in bodies:
        otherwise = ours - set(cls.model_fields) - set(cls.aliases)
        # Of the model; told by grammar_names; that cannot be asked for here.
        assert otherwise - {"adapter", "grammar", "prompt"} <= {
            "prompt_logprobs", *(() if cls is not ResponseBody else ours - {"max_tokens"}),
        }  # fmt: skip
