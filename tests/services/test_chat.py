"""What may be asked of a chat, checked before anything is rendered."""

import pytest
from chat_templates import CALLED, CLOCK, RESULT, TOOLS, WEATHER

from redmux.errors import FailedPreconditionError, InvalidArgumentError
from redmux_adapters.text.request_template import MAX_TEMPLATE_BYTES
from redmux_server.services.chat import MAX_DEPTH, MAX_TOOLS, check_chat, options_of
from redmux_server.services.spec import Chat
from redmux_server.services.validation import Validator

USER = [{"role": "user", "content": "x"}]


def check(allow_template=False, messages=USER, **fields):
    return check_chat(Chat(messages, **fields), allow_template=allow_template)


def function(**fields):
    return {"type": "function", "function": {"name": "f", **fields}}


def nested(depth):
    return {} if depth == 0 else {"a": nested(depth - 1)}


REFUSED = {
    "129 tools; limit 128": {"tools": [CLOCK] * (MAX_TOOLS + 1)},
    "two tools have one name": {"tools": [CLOCK, CLOCK]},
    r"tools\[0\] has to be \{": {"tools": ["clock"]},
    r"tools\[1\] has to be \{": {"tools": [CLOCK, {"type": "function"}]},
    r"tools\[0\] is of type 'web_search'; only": {"tools": [{**CLOCK, "type": "web_search"}]},
    r"tools\[0\] has 'format', which is not served": {"tools": [{**CLOCK, "format": "x"}]},
    r"tools\[0\] has 'examples', which is not served": {"tools": [function(examples=[])]},
    r"tools\[0\] has description 3, of a wrong kind": {"tools": [function(description=3)]},
    r"tools\[0\] has parameters 'x', of a wrong kind": {"tools": [function(parameters="x")]},
    r"tools\[0\] has name None": {"tools": [{"function": {"name": None}}]},
    r"tools\[0\] has name 'a b'; it has to be 1 to 64": {"tools": [function(name="a b")]},
    r"tools\[0\] has name 'f.n'": {"tools": [function(name="f\n")]},
    r"tools\[0\] has name 'x{65}'": {"tools": [function(name="x" * 65)]},
    r"tools\[0\] has name 'auto', which is a tool_choice": {"tools": [function(name="auto")]},
    'parameters that are not of "type": "object"': {
        "tools": [function(parameters={"type": "array"})],
    },
    "tool_choice is 'required', but the request has no tools": {"tool_choice": "required"},
    "tool_choice is 'clock', but the request has no tools": {"tool_choice": "clock"},
    "tool_choice is 'x', which is none of the tools": {"tools": TOOLS, "tool_choice": "x"},
    "exclude each other; set one to false": {"continue_final_message": True},
    "chat template is empty": {"template": "", "allow_template": True},
    f"65537 bytes; limit {MAX_TEMPLATE_BYTES}": {
        "template": "x" * (MAX_TEMPLATE_BYTES + 1), "allow_template": True,
    },
    f"more than {MAX_DEPTH} levels": {"template_args": nested(100)},
    "levels ": {"tools": [function(parameters=nested(100))]},
    "levels": {"messages": [{"role": "user", "content": [nested(100)]}]},
    "holds b'x', which is no JSON": {"template_args": {"a": b"x"}},
    "message 0 is 'x'; it has to be an object": {"messages": ["x"]},
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_a_chat_that_is_none_is_refused_with_the_reason(message):
    with pytest.raises(InvalidArgumentError, match=message.strip()):
        check(**REFUSED[message])


def test_a_template_of_the_request_is_taken_where_the_server_says_so():
    with pytest.raises(FailedPreconditionError, match="--allow-request-template"):
        check(template="x")
    assert check(template="x", allow_template=True) == 1


def test_chats_as_clients_send_them_are_taken():
    strict = {**CLOCK, "function": {**CLOCK["function"], "strict": True, "parameters": None}}
    check(messages=[*USER, CALLED, RESULT], tools=[strict, WEATHER], tool_choice="clock")
    check(tools=TOOLS, tool_choice="required", template_args={"a": [1, 0.5, None, True]})
    check(continue_final_message=True, add_generation_prompt=False)
    check(tool_choice="none")


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x" * 700}]}]},
        {"messages": [*USER, {"role": "assistant", "tool_calls": [
            {"function": {"name": "f", "arguments": "x" * 700}}]}]},
        {"tools": [function(description="x" * 700)]},
        {"tools": [function(parameters={"properties": {"x" * 700: {}}})]},
        {"template_args": {"a": {"x" * 700: 1}}},
    ],
    ids=["parts", "arguments", "description", "key", "variable"],
)  # fmt: skip
def test_every_text_of_a_chat_counts(fields):
    validator = Validator(100, 43)
    with pytest.raises(InvalidArgumentError, match=r"prompt has 7\d\d bytes; limit 688"):
        validator.prompt(Chat(**{"messages": USER, **fields}))


def test_with_the_choice_none_the_model_sees_no_tools():
    assert options_of(Chat(USER, tools=TOOLS, tool_choice="none")).tools == []
    assert len(options_of(Chat(USER, tools=TOOLS)).tools) == 2


def test_tools_are_written_alike_however_they_came():
    function = {"strict": True, "parameters": {"b": 1, "a": 2}, "description": None, "name": "f"}
    (tool,) = options_of(Chat(USER, tools=[{"function": function}])).tools
    assert list(tool) == ["type", "function"]
    assert list(tool["function"].items()) == [("name", "f"), ("parameters", {"b": 1, "a": 2})]
