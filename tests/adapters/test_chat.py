"""Chats with tools, parts, continued messages and templates of the request, as tokens."""

import json

import pytest
from chat_templates import CALLED, RESULT, TEMPLATES, TOOLS, tokenizer_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_at_hand import CHATML, END, SPECIAL, START, make

from redmux.errors import InvalidArgumentError
from redmux_adapters import PromptFormat, Turn
from redmux_adapters.text.encoder import TextEncoder
from redmux_adapters.text.template import ChatOptions

quick = settings(deadline=None, database=None, max_examples=25)
TOKENIZERS = {family: tokenizer_of(template) for family, template in TEMPLATES.items()}
ENCODERS = {family: TextEncoder(tokenizer) for family, tokenizer in TOKENIZERS.items()}
USER = {"role": "user", "content": "Weather?"}
TURNS = PromptFormat(user=Turn("Q: ", "\n"), assistant=Turn("A: ", "\n"), system=Turn("", "\n"))


def ids_of(encoder, messages, form=None, **options):
    return encoder.encode(encoder.render(messages, form, ChatOptions(**options))).ids


def text_of(encoder, messages, form=None, **options):
    return encoder.render(messages, form, ChatOptions(**options)).text


def parsed(message):
    """The message as transformers wants it: arguments are objects, nothing is None."""
    message = {key: value for key, value in message.items() if value is not None}
    if "tool_calls" in message:
        calls = [call["function"] for call in message["tool_calls"]]
        functions = [{**f, "arguments": json.loads(f["arguments"])} for f in calls]
        message["tool_calls"] = [{"type": "function", "function": f} for f in functions]
    return message


TALKS = {
    "a question": [USER],
    "a system message": [{"role": "system", "content": "Be brief."}, USER],
    "a call": [USER, CALLED],
    "a call without content": [USER, {**CALLED, "content": None}],
    "a result": [USER, CALLED, RESULT],
    "an answer": [USER, CALLED, RESULT, {"role": "assistant", "content": "It is."}, USER],
}
WITHOUT_CALLS = ("a question", "a system message")  # one of the templates writes none


@pytest.mark.parametrize("is_open", [True, False])
@pytest.mark.parametrize("tools", [[], TOOLS], ids=["bare", "tools"])
@pytest.mark.parametrize(
    ("family", "talk"),
    [(f, t) for f in TEMPLATES for t in TALKS if f != "smollm" or t in WITHOUT_CALLS],
)
def test_a_chat_is_what_transformers_makes_of_it(family, talk, tools, is_open):
    messages = TALKS[talk]
    expected = TOKENIZERS[family].apply_chat_template(
        list(map(parsed, messages)), tools=tools or None, add_generation_prompt=is_open,
        tokenize=True, return_dict=False,
    )  # fmt: skip
    assert ids_of(ENCODERS[family], messages, tools=tools, is_open=is_open) == expected
    of_request = ids_of(
        ENCODERS["qwen"], messages, tools=tools, is_open=is_open, template=TEMPLATES[family]
    )
    assert of_request == expected


# -- messages -----------------------------------------------------------------------------------


def test_text_parts_are_joined_by_line_breaks_and_a_developer_is_the_system():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    got = text_of(
        ENCODERS["qwen"], [{"role": "developer", "content": "S"}, {**USER, "content": parts}]
    )
    assert got == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\na\nb<|im_end|>\n<|im_start|>assistant\n"
    )
    empty = text_of(ENCODERS["qwen"], [{**USER, "content": []}])
    assert empty == text_of(ENCODERS["qwen"], [{**USER, "content": ""}])


def test_what_openais_answers_have_beside_is_taken_where_it_is_empty():
    answer = {"role": "assistant", "content": "A", "refusal": None, "annotations": [],
              "tool_calls": None, "audio": None}  # fmt: skip
    plain = {"role": "assistant", "content": "A"}
    assert text_of(ENCODERS["qwen"], [USER, answer]) == text_of(ENCODERS["qwen"], [USER, plain])


def call(**function):
    return {"role": "assistant", "tool_calls": [{"id": "x", "function": function}]}


WRONG = {
    "message 1 has role 'function'; use system": {"role": "function", "content": "x"},
    "message 1 has the key 'audio', which is not served": {**USER, "audio": {"id": "x"}},
    "message 1 has content None": {"role": "assistant", "content": None},
    "message 1 has content 3": {"role": "user", "content": 3},
    "message 1 has a content part 1 of type 'image_url'; only text": {
        "role": "user",
        "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}],
    },
    "message 1 has a content part 0 of type None": {"role": "user", "content": ["a"]},
    "message 1 has a content part 0 with text None": {**USER, "content": [{"type": "text"}]},
    "message 1 has name 3": {**USER, "name": 3},
    "message 1 has tool_calls; only an assistant's may": {**CALLED, "role": "user", "content": ""},
    "message 1 has tool_calls 'x'": {"role": "assistant", "tool_calls": "x"},
    'message 1 has a tool call 0 without a "function"': {"role": "assistant", "tool_calls": [{}]},
    "message 1 has a tool call 0 of type 'custom'": {
        "role": "assistant", "tool_calls": [{"type": "custom", "function": {}}],
    },
    "message 1 has a tool call 0 with name None": call(arguments="{}"),
    "message 1 has a tool call 0 with id 3": {
        "role": "assistant", "tool_calls": [{"id": 3, "function": {"name": "f"}}],
    },
    r"message 1 has a tool call 0 with arguments '\{'": call(name="f", arguments="{"),
    r"message 1 has a tool call 0 with arguments '\[1\]'": call(name="f", arguments="[1]"),
    "message 1 has a tool call 0 with arguments 'nested": call(name="f", arguments="nested" * 99),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_a_message_that_is_none_is_told_with_its_place(message):
    for form in (None, TURNS):
        with pytest.raises(InvalidArgumentError, match=message) as caught:
            text_of(ENCODERS["qwen"], [USER, WRONG[message]], form)
        assert len(caught.value.message) < 250


def test_a_template_that_refuses_is_told_in_its_own_words():
    twice = {"role": "assistant", "tool_calls": CALLED["tool_calls"] * 2}
    for template in (None, TEMPLATES["llama"]):
        with pytest.raises(InvalidArgumentError, match="refused: This model only supports single"):
            text_of(ENCODERS["llama"], [USER, twice], template=template)
    with pytest.raises(InvalidArgumentError, match=r"refused: .*has no attribute 'content'"):
        text_of(TextEncoder(make(template="{{ messages[1].content + '' }}")), [USER, CALLED])
    with pytest.raises(InvalidArgumentError, match=r"refused: .*zero"):
        text_of(TextEncoder(make(template="{{ 1 // 0 }}")), [USER])


# -- what came from others is data ----------------------------------------------------------------

marks = st.sampled_from([*SPECIAL, "<|im_", "end|>", "<", "\ue000", "\ue001", "\\ue0000\\ue001",
                         "\ue0000\ue001", "a", " ", '"', "\\", "\u00e9"])  # fmt: skip
hostile = st.lists(marks, max_size=5).map("".join)
schemas = st.recursive(
    hostile | st.integers(), lambda inner: st.dictionaries(hostile, inner, max_size=3), max_leaves=4
)


def talk(texts, schema):
    """A chat with other people's texts in every place that has some, and its tools."""
    name, description, argument, content, result = texts
    function = {"name": "f" + name, "arguments": json.dumps({argument: schema})}
    messages = [
        {"role": "system", "content": content},
        {"role": "user", "content": [{"type": "text", "text": content}], "name": name},
        {"role": "assistant", "content": None,
         "tool_calls": [{"id": name, "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": name, "name": name, "content": result},
    ]  # fmt: skip
    parameters = {"type": "object", "properties": {argument: schema}, description: [description]}
    tool = {"name": "f" + name, "description": description, "parameters": parameters}
    return messages, [{"type": "function", "function": tool}]


def special(ids):
    return [i for i in ids if i in SPECIAL.values()]


@pytest.mark.parametrize("family", ["qwen", "llama", "hermes"])
@given(st.lists(hostile, min_size=5, max_size=5), schemas, st.booleans())
@quick
def test_nothing_that_came_from_others_becomes_a_special_token(family, texts, schema, of_request):
    encoder = ENCODERS["qwen" if of_request else family]
    options = {"template": TEMPLATES[family] if of_request else None}
    messages, tools = talk(texts, schema)
    harmless, plain = talk(["a"] * 5, 1)
    args = {"date_string": texts[0] + "a"}
    ids = ids_of(encoder, messages, tools=tools, args=args, **options)
    wanted = ids_of(encoder, harmless, tools=plain, args={"date_string": "a"}, **options)
    assert special(ids) == special(wanted)


@pytest.mark.parametrize("family", ["qwen", "llama", "hermes"])
@given(st.lists(hostile, min_size=5, max_size=5), schemas)
@quick
def test_what_came_from_others_is_in_the_text_as_it_is(family, texts, schema):
    messages, tools = talk(texts, schema)
    hand_made = [{**message, "content": texts[3]} if message["role"] == "user" else parsed(message)
                 for message in messages]  # fmt: skip
    hand_made[2]["tool_calls"][0]["id"] = texts[0]
    expected = TOKENIZERS[family].apply_chat_template(
        hand_made, tools=tools, add_generation_prompt=True, tokenize=False
    )
    if family == "hermes":  # repr() writes private characters as escapes
        expected = expected.replace("\\ue000", "\ue000").replace("\\ue001", "\ue001")
        got = text_of(ENCODERS[family], messages, tools=tools)
        assert got.replace("\\ue000", "\ue000").replace("\\ue001", "\ue001") == expected
    else:
        assert text_of(ENCODERS[family], messages, tools=tools) == expected


def test_special_tokens_in_tools_are_those_tokens_where_the_request_says_so():
    messages, tools = talk(["<|im_end|>"] * 5, 1)
    ids = ids_of(ENCODERS["qwen"], messages, tools=tools, parse_special=True)
    harmless, plain = talk(["a"] * 5, 1)
    assert ids.count(END) > ids_of(ENCODERS["qwen"], harmless, tools=plain).count(END) + 5


# -- where a chat ends ----------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["Once upon", "Once  ", " a\n", "", "x<|im_end|>", "a<|im_"])
@pytest.mark.parametrize("family", TEMPLATES)
def test_a_final_message_is_continued_as_transformers_does(family, content):
    messages = [USER, {"role": "assistant", "content": content}]
    options = {"is_open": False, "is_continued": True}
    got = text_of(ENCODERS[family], messages, **options)
    if content:  # transformers looks for the content
        assert got == TOKENIZERS[family].apply_chat_template(
            messages, continue_final_message=True, tokenize=False
        )
    assert got.endswith(content.strip(" \n") if family == "llama" else content)
    of_request = text_of(ENCODERS["qwen"], messages, template=TEMPLATES[family], **options)
    assert of_request == got
    ids = ids_of(ENCODERS[family], messages, **options)
    assert special(ids)[-1] == START


def test_a_prompt_format_continues_and_ends_as_well():
    messages = [USER, {"role": "assistant", "content": "It "}]
    encoder = ENCODERS["qwen"]
    continued = text_of(encoder, messages, TURNS, is_open=False, is_continued=True)
    assert continued == "Q: Weather?\nA: It "
    assert text_of(encoder, messages, TURNS, is_open=False) == "Q: Weather?\nA: It \n"
    assert text_of(encoder, messages, TURNS) == "Q: Weather?\nA: It \nA: "


def test_what_cannot_be_continued_is_refused():
    options = {"is_open": False, "is_continued": True}
    with pytest.raises(InvalidArgumentError, match="final message has no content"):
        text_of(ENCODERS["qwen"], [USER, CALLED], **options)
    silent = TextEncoder(make(template="{{ messages[0].content }}"))
    with pytest.raises(InvalidArgumentError, match="does not write the final message"):
        text_of(silent, [USER, USER], **options)


# -- variables ------------------------------------------------------------------------------------


def test_variables_reach_the_template():
    got = text_of(ENCODERS["qwen"], [USER], args={"enable_thinking": False})
    assert got.endswith("<|im_start|>assistant\n<think></think>")
    assert got == TOKENIZERS["qwen"].apply_chat_template(
        [USER], add_generation_prompt=True, tokenize=False, enable_thinking=False
    )
    of_request = text_of(
        ENCODERS["llama"], [USER], template=TEMPLATES["qwen"], args={"enable_thinking": False}
    )
    assert of_request == got


@pytest.mark.parametrize(
    "name",
    ["messages", "tools", "documents", "add_generation_prompt", "continue_final_message",
     "chat_template", "conversation", "tokenize", "bos_token", "pad_token", "self"],
)  # fmt: skip
def test_no_variable_replaces_what_a_template_is_given_anyway(name):
    for template in (None, CHATML):
        with pytest.raises(InvalidArgumentError, match=f"template_args has '{name}'"):
            text_of(ENCODERS["qwen"], [USER], template=template, args={name: "x"})


# -- an adapter's format --------------------------------------------------------------------------


def test_a_prompt_format_says_what_it_cannot_write():
    encoder = ENCODERS["qwen"]
    refused = "prompt format cannot write tools, their calls or their results"
    for messages in ([USER, CALLED], [USER, RESULT]):
        with pytest.raises(InvalidArgumentError, match=refused):
            text_of(encoder, messages, TURNS)
    with pytest.raises(InvalidArgumentError, match=refused):
        text_of(encoder, [USER], TURNS, tools=TOOLS)
    with pytest.raises(InvalidArgumentError, match="takes no template_args"):
        text_of(encoder, [USER], TURNS, args={"x": 1})
    assert text_of(encoder, [USER], TURNS, template="{{ messages[0].content }}") == "Weather?"
