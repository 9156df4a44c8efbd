"""Chats over gRPC: what a servicer makes of them and of the calls in a completion."""

import json

import pytest
from chat_templates import CALLED, RESULT, TOOLS

from redmux import _calls
from redmux.errors import InvalidArgumentError
from redmux.types import ToolCall, ToolCallDelta
from redmux.v1 import inference_service_pb2 as pb
from redmux_adapters.text.messages import normal
from redmux_adapters.text.tool_format import ToolFormat
from redmux_server.engine.request import FinishReason
from redmux_server.grpc_api.chats import chat_of, plain_messages
from redmux_server.grpc_api.servicers import InferenceServicer
from redmux_server.keys import ApiKeys
from redmux_server.services.chat import options_of
from redmux_server.services.choice import Delta, Finish
from redmux_server.services.spec import Chat
from redmux_server.services.tools import ToolCallParser

USER = {"role": "user", "content": "x"}
PARTS = {
    "role": "developer",
    "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
}
TALK = [PARTS, USER, {**CALLED, "content": None}, RESULT]
FORM = ToolFormat("<tool_call>", "<tool_call>\n", "\n</tool_call>")
PIECES = ["Let me see. <tool", '_call>{"name": "clock", "argu', 'ments": {"a"', ": 1}}</tool_call>",
          '<tool_call>{"name": "clock"}</tool_call>']  # fmt: skip


def sent(messages, **options):
    """The chat that a server gets of the Python client's."""
    return chat_of(_calls.generation(messages, **options).chat)


def test_the_clients_chat_arrives_as_it_was_meant():
    options = {
        "template": "x", "template_args": {"a": {"b": [1, None]}}, "tools": TOOLS,
        "tool_choice": "clock", "parallel_tool_calls": False, "continue_final_message": True,
        "parse_special_tokens": True,
    }  # fmt: skip
    got = sent(TALK, **options)
    expected = Chat(
        TALK, parse_special=True, template="x", add_generation_prompt=False,
        continue_final_message=True, template_args={"a": {"b": [1, None]}}, tools=TOOLS,
        tool_choice="clock", parallel_tool_calls=False,
    )  # fmt: skip
    assert normal(got.messages) == normal(expected.messages)
    assert options_of(got) == options_of(expected)
    assert (got.tool_choice, got.parallel_tool_calls) == ("clock", False)


def test_what_is_left_out_is_as_in_a_plain_chat():
    assert options_of(sent([USER])) == options_of(Chat([USER]))
    plain = sent([USER])
    assert (plain.tool_choice, plain.parallel_tool_calls) == ("auto", True)
    assert not sent([USER], add_generation_prompt=False).add_generation_prompt
    both = sent([USER], add_generation_prompt=True, continue_final_message=True)
    assert both.add_generation_prompt
    assert both.continue_final_message


def test_a_choice_of_a_function_may_be_in_openais_form():
    choice = {"type": "function", "function": {"name": "clock"}}
    assert sent([USER], tools=TOOLS, tool_choice=choice).tool_choice == "clock"


def test_calls_of_a_completion_go_into_the_next_prompt_as_they_are():
    call = ToolCall("call_1", "get_weather", '{"city": "Ulm", "days": 2}')
    messages = [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]
    assert normal(sent(messages).messages) == normal([USER, CALLED])


WRONG = {
    r"prompt\[0\]: 'audio' is no key of a chat message": ([{**USER, "audio": 1}], {}),
    r"prompt\[0\]: content\[0\] is .*only parts of type text": (
        [{"role": "user", "content": [{"type": "image_url"}]}], {},
    ),
    r"prompt\[0\]: a chat message has the keys": ([{"role": "assistant"}], {}),
    r"prompt\[0\]: tool_calls is 'x', must be a list": ([{**USER, "tool_calls": "x"}], {}),
    r"prompt\[0\]: tool_calls\[0\] is 'x'; give a ToolCall": ([{**USER, "tool_calls": ["x"]}], {}),
    r"prompt\[0\]: tool_calls\[0\].name is 3, must be a text": (
        [{**USER, "tool_calls": [{"function": {"name": 3}}]}], {},
    ),
    r"tools is 'x', must be a list": ([USER], {"tools": "x"}),
    r"tools\[0\] is 'x'; give": ([USER], {"tools": ["x"]}),
    r"tools\[0\]: type is 'custom'": ([USER], {"tools": [{"type": "custom", "function": {}}]}),
    r"tools\[0\]: 'x' is no key of a function": ([USER], {"tools": [{"function": {"x": 1}}]}),
    r"tools\[0\].parameters is 'x', must be a mapping": (
        [USER], {"tools": [{"function": {"name": "f", "parameters": "x"}}]},
    ),
    "template_args is 3, must be a mapping": ([USER], {"template_args": 3}),
    "template_args cannot be written as JSON": ([USER], {"template_args": {"a": b"x"}}),
    "tool_choice is {}; give auto, none": ([USER], {"tool_choice": {}}),
    "tool_choice is 3, must be a text": ([USER], {"tool_choice": 3}),
    "tools is for chats": ("Hi", {"tools": TOOLS}),
    "continue_final_message is for chats": ([1, 2], {"continue_final_message": True}),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_what_no_chat_has_is_told_with_its_place(message):
    prompt, options = WRONG[message]
    with pytest.raises(InvalidArgumentError, match=message):
        _calls.generation(prompt, **options)


@pytest.mark.parametrize("text", ["[1]", "{", "[" * 100_000, "9" * 5000])
def test_what_is_no_json_object_is_refused(text):
    chat = pb.Chat(messages=[pb.ChatMessage(role="user")], template_args_json=text)
    with pytest.raises(InvalidArgumentError, match=r"^template_args_json "):
        chat_of(chat)
    tools = [pb.Tool(name="f", parameters_json=text)]
    with pytest.raises(InvalidArgumentError, match=r"^tools\[0\].parameters_json "):
        chat_of(pb.Chat(messages=[pb.ChatMessage(role="user")], tools=tools))


def test_training_takes_roles_and_contents_and_says_what_it_does_not_take():
    turn = pb.ChatMessage(role="user", content="x")
    assert plain_messages("records[0]", pb.Chat(messages=[turn])) == [USER]
    called = pb.ChatMessage(role="assistant", tool_calls=[pb.ToolCall(name="f")])
    for chat, name in (
        (pb.Chat(messages=[turn, called]), "tool_calls"),
        (pb.Chat(messages=[turn], tools=[pb.Tool(name="f")]), "tools"),
        (pb.Chat(messages=[turn], continue_final_message=True), "continue_final_message"),
    ):
        with pytest.raises(InvalidArgumentError, match=rf"records\[0\].chat has {name}"):
            plain_messages("records[0]", chat)


class Written:
    """A generation of two choices, both of which have written PIECES."""

    prompt_scores = None

    def __init__(self, **options):
        self._options = options

    def tool_parser(self):
        return ToolCallParser(FORM, ["clock"], **self._options)

    async def deltas(self):
        for i, piece in enumerate(PIECES):
            for index in range(2):
                yield Delta(index, text=piece, token_ids=[i])
        for index in range(2):
            yield Delta(index, finish=Finish(FinishReason.STOP, "", 1, 0, 0, 5))


class Service:
    """A generation service whose completions are all the same."""

    async def submit(self, spec, tenant):
        return Written(is_parallel=spec.prompt.parallel_tool_calls), None


class Call:
    """A call without a deadline."""

    def time_remaining(self):
        return None


@pytest.fixture
def servicer():
    return InferenceServicer(Service(), None, None, None, ApiKeys(()))


@pytest.mark.parametrize("is_parallel", [True, False])
async def test_calls_come_whole_and_in_parts(servicer, is_parallel):
    generation = _calls.generation([USER], tools=TOOLS, parallel_tool_calls=is_parallel)
    response = await servicer.Complete(pb.CompleteRequest(generation=generation), Call())
    for whole in _calls.completion(response, with_logprobs=False).choices:
        assert whole.text == "Let me see."
        assert whole.token_ids == (0, 1, 2, 3, 4)
        assert [(call.name, call.arguments) for call in whole.tool_calls] == [
            ("clock", '{"a": 1}'), ("clock", "{}"),
        ][: 2 if is_parallel else 1]  # fmt: skip

    stream = servicer.Generate(pb.GenerateRequest(generation=generation), Call())
    chunks = [_calls.chunk(message, with_logprobs=False) async for message in stream]
    for index in range(2):
        own = [chunk for chunk in chunks if chunk.index == index]
        assert "".join(chunk.text for chunk in own) == "Let me see."
        parts = [delta for chunk in own for delta in chunk.tool_calls]
        assert all(isinstance(part, ToolCallDelta) for part in parts)
        arguments = ["".join(p.arguments for p in parts if p.index == i) for i in range(2)]
        assert json.loads(arguments[0]) == {"a": 1}
        assert arguments[1] == ("{}" if is_parallel else "")
        assert [p.name for p in parts if p.id] == ["clock"] * (2 if is_parallel else 1)
