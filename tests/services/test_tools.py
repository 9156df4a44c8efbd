"""ToolCallParser: calls in what a model writes, in any pieces."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from redmux_adapters.text.tool_format import ToolFormat
from redmux_server.services.tools import ToolCallParser, whole_calls

quick = settings(deadline=None, database=None, max_examples=100)
TAGGED = ToolFormat("<tool_call>", "<tool_call>\n", "\n</tool_call>")
LISTED = ToolFormat("<tool_call>", "<tool_call>[", "]</tool_call>", is_list=True)
BARE = ToolFormat(arguments_key="parameters")
PYTHON = ToolFormat("<|python_tag|>", "<|python_tag|>", arguments_key="parameters")
SPECIAL = ToolFormat("<tool_call>", "<tool_call>\n", "\n</tool_call>", is_special=True)
FORMS = {"tagged": TAGGED, "list": LISTED, "bare": BARE, "python": PYTHON, "special": SPECIAL}
NAMES = ("get_weather", "f")
CALL = '{"name": "get_weather", "arguments": {"city": "Ulm", "a": [1, {"b": "}]\\"{"}]}}'
ARGUMENTS = '{"city": "Ulm", "a": [1, {"b": "}]\\"{"}]}'


def parsed(form, pieces, **options):
    """The text, and (name, arguments) of each call, of a completion that comes in pieces."""
    parser = ToolCallParser(form, NAMES, **options)
    text, deltas = "", []
    for i, piece in enumerate(pieces):
        said, some = parser.push(piece, is_last=i == len(pieces) - 1)
        text += said
        deltas += some
    calls = whole_calls(deltas)
    assert [call.index for call in calls] == list(range(len(calls)))
    assert len({call.id for call in calls}) == len(calls)
    assert all(call.id.startswith("call_") for call in calls)
    return text, [(call.name, call.arguments) for call in calls]


F = ("f", "{}")
WEATHER = ("get_weather", ARGUMENTS)
CASES = {
    "one call": (TAGGED, f"<tool_call>\n{CALL}\n</tool_call>", "", [WEATHER]),
    "text before": (TAGGED, f"I see.\n\n<tool_call>{CALL}\n</tool_call>\n", "I see.", [WEATHER]),
    "two calls": (
        TAGGED,
        f'<tool_call>{CALL}</tool_call>\n<tool_call>{{"name": "f"}}</tool_call>',
        "",
        [WEATHER, F],
    ),
    "text between and behind": (
        TAGGED,
        '<tool_call>{"name": "f"}</tool_call> then <tool_call>{"name": "f"}</tool_call> done ',
        " then done ",
        [F, F],
    ),
    "no end tag": (TAGGED, f"<tool_call>{CALL}\n<tool_call>{CALL}", "", [WEATHER, WEATHER]),
    "arguments first": (
        TAGGED,
        '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>',
        "",
        [("f", '{"a": 1}')],
    ),
    "other keys": (
        TAGGED,
        '<tool_call>{"id": "x{", "n": -1.5e3, "l": [{}], "name": "f", "t": null}</tool_call>',
        "",
        [F],
    ),
    "a list": (TAGGED, f'<tool_call>[{CALL}, {{"name": "f"}}]</tool_call>', "", [WEATHER, F]),
    "a list where lists are meant": (LISTED, f"<tool_call>[{CALL}]</tool_call>", "", [WEATHER]),
    "an empty list is no call": (LISTED, "<tool_call>[]</tool_call>", None, []),
    "bare": (BARE, '{"name": "f", "parameters": {"x": "y"}}', "", [("f", '{"x": "y"}')]),
    "bare behind a tag": (BARE, '<|python_tag|>{"name": "f", "parameters": {}}', "", [F]),
    "two bare": (BARE, ' {"name": "f"}; {"name": "f"}\n', "", [F, F]),
    "bare inside text": (BARE, 'It is {"name": "f"}', 'It is {"name": "f"}', []),
    "a JSON answer": (BARE, '{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}', []),
    "python tag": (PYTHON, f"<|python_tag|>{CALL}", "", [WEATHER]),
    "a tag that no text has": (SPECIAL, f"\n{CALL}\n\n{CALL}", "", [WEATHER, WEATHER]),
    "plain text": (TAGGED, " 1 < 2, <tool <b>\n ", " 1 < 2, <tool <b>\n ", []),
    "nothing": (TAGGED, "", "", []),
    "blanks": (TAGGED, " \n", " \n", []),
    "a tag at the end": (TAGGED, "a <tool_call>", "a <tool_call>", []),
    "a part of a tag at the end": (TAGGED, "a <tool_", "a <tool_", []),
    "an unknown function": (
        TAGGED,
        '<tool_call>{"name": "g", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "g", "arguments": {}}</tool_call>',
        [],
    ),
    "no name": (TAGGED, '<tool_call>{"arguments": {}}</tool_call>', None, []),
    "no object": (TAGGED, "<tool_call>f(1)</tool_call>", None, []),
    "arguments that are no object": (
        TAGGED, '<tool_call>{"name": "f", "arguments": [1]}</tool_call>', None, [],
    ),
    "empty object": (TAGGED, "<tool_call>{}</tool_call>", None, []),
    "a comma too many": (TAGGED, '<tool_call>{"name": "f",}</tool_call>', None, []),
    "a call behind a broken one": (
        TAGGED,
        '<tool_call>{oops <tool_call>{"name": "f"}</tool_call>',
        "<tool_call>{oops",
        [F],
    ),
    "cut in its name": (TAGGED, '<tool_call>{"name": "f', '<tool_call>{"name": "f', []),
    "cut in its arguments": (
        TAGGED, '<tool_call>{"name": "f", "arguments": {"a": "b', "", [("f", '{"a": "b')],
    ),
    "broken in its arguments": (
        TAGGED,
        '<tool_call>{"name": "f", "arguments": {"a": 1]}</tool_call>',
        "]}</tool_call>",
        [("f", '{"a": 1')],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_completion_is_text_and_calls(case):
    form, text, said, calls = CASES[case]
    said = text if said is None else said
    assert parsed(form, [text]) == (said, calls)
    assert parsed(form, [*text, ""]) == (said, calls)


pieces = st.sampled_from(
    ["<tool_call>", "</tool_call>", "<tool_", "<|python_tag|>", "{", "}", "[", "]", ",", ":", ";",
     '"', "\\", " ", "\n", "a", '"name"', '"f"', '"arguments"', '"parameters"', '{"name": "f"',
     ', "arguments": {"x": 1', "}}", CALL, "null", "1"]
)  # fmt: skip


@given(st.sampled_from(sorted(FORMS)), st.lists(pieces, max_size=14), st.data())
@quick
def test_a_completion_is_the_same_however_it_is_cut(form, parts, data):
    text = "".join(parts)
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    cut = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
    whole = parsed(FORMS[form], [text])
    assert parsed(FORMS[form], cut) == whole
    assert parsed(FORMS[form], [*text, ""]) == whole


@given(st.sampled_from(sorted(FORMS)), st.lists(pieces, max_size=14))
@quick
def test_what_has_no_call_is_given_out_as_it_stands(form, parts):
    text = "".join(parts)
    said, calls = parsed(FORMS[form], [text])
    if not calls:
        assert said == text


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from(["tagged", "list", "python"]), st.dictionaries(st.text(), values), st.text())
@quick
def test_arguments_come_out_as_they_went_in(form, arguments, before):
    form, before = FORMS[form], before.replace("<", "")
    call = {"name": "f", form.arguments_key: arguments}
    text = before + form.before + json.dumps(call) + form.after
    said, [(name, written)] = parsed(form, list(text))
    assert (name, json.loads(written)) == ("f", arguments)
    assert said == before.rstrip(" \t\r\n")


def test_arguments_are_streamed_as_they_come():
    parser = ToolCallParser(TAGGED, NAMES)
    assert parser.push('<tool_call>{"name": "f"') == ("", [])
    _, (begun,) = parser.push(', "arguments": {"a"')
    assert (begun.index, begun.name, begun.arguments) == (0, "f", '{"a"')
    _, (more,) = parser.push(": 1}")
    assert (more.index, more.id, more.name, more.arguments) == (0, "", "", ": 1}")
    assert parser.push("}</tool_call>", is_last=True) == ("", [])
    assert parser.num_calls == 1


def test_an_answer_in_json_is_streamed_as_soon_as_it_is_none():
    parser = ToolCallParser(BARE, NAMES)
    assert parser.push('{"city"') == ('{"city"', [])
    assert parser.push(': {"a": 1') == (': {"a": 1', [])


def test_calls_after_the_first_are_left_out_where_there_may_be_one():
    text = f'<tool_call>{CALL}</tool_call><tool_call>{{"name": "f"}}</tool_call>'
    assert parsed(TAGGED, list(text), is_parallel=False) == ("", [WEATHER])


def test_long_texts_of_beginnings_come_out_as_they_stand():
    for text in ("<tool_call>" * 2000, " " * 20_000, '<tool_call>{"a": "' + "<" * 20_000,
                 "<" * 20_000, '{"name": ' * 2000, "[" * 20_000):  # fmt: skip
        for form in FORMS.values():
            said, _ = parsed(form, [text])
            assert said == text
