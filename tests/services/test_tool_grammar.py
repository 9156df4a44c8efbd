"""The grammar of tools: what a model writes under it is a call, by walks through its tokens."""

import json
import random
from dataclasses import replace

import jsonschema
import llguidance
import numpy as np
import pytest
from chat_templates import CLOCK, TEMPLATES, TOOLS, WEATHER, tokenizer_of
from tokenizers_at_hand import make

from redmux.errors import InvalidArgumentError
from redmux_adapters.text.encoder import TextEncoder
from redmux_server.services.spec import Chat, GenerationSpec, Grammar, GrammarKind
from redmux_server.services.tool_grammar import tool_grammar, with_tools
from redmux_server.services.tools import ToolCallParser, whole_calls

END = 2
TOKENIZER = tokenizer_of(TEMPLATES["qwen"])
FORMS = {name: TextEncoder(tokenizer_of(t)).tool_format(None) for name, t in TEMPLATES.items()}
LL_TOKENIZER = llguidance.LLTokenizer(TOKENIZER.backend_tokenizer.to_str(), eos_token=[END])
SCHEMAS = {
    "get_weather": WEATHER["function"]["parameters"],
    "clock": {"type": "object", "additionalProperties": False},
}


def matcher(grammar, tokenizer=LL_TOKENIZER):
    assert grammar.kind is GrammarKind.LARK
    found = llguidance.LLMatcher(tokenizer, llguidance.LLMatcher.grammar_from_lark(grammar.source))
    assert not found.is_error(), found.get_error()
    return found


def takes(grammar, text):
    """Whether the grammar takes all of a text, and it may end there."""
    found, ids = matcher(grammar), TOKENIZER(text, add_special_tokens=False)["input_ids"]
    return found.try_consume_tokens(ids) == len(ids) and found.is_accepting()


def walk(grammar, seed, most=600):
    """A text of random tokens that the grammar allows, which ends as soon as it may."""
    found, rng, ids = matcher(grammar), random.Random(seed), []
    while not (found.is_accepting() and rng.random() < 0.7) and not found.is_stopped():
        mask = np.unpackbits(np.frombuffer(found.compute_bitmask(), np.uint8), bitorder="little")
        allowed = [int(i) for i in np.flatnonzero(mask) if i != END]
        if not allowed or len(ids) > most:
            break
        ids.append(rng.choice(allowed))
        assert found.consume_token(ids[-1])
    return TOKENIZER.decode(ids, skip_special_tokens=True), found.is_accepting()


def calls_in(form, text, names=SCHEMAS):
    said, deltas = ToolCallParser(form, names).push(text, is_last=True)
    return said, [(call.name, json.loads(call.arguments)) for call in whole_calls(deltas)]


@pytest.mark.parametrize("choice", ["required", "clock", "get_weather"])
@pytest.mark.parametrize("family", FORMS)
def test_all_that_the_grammar_allows_are_calls_of_the_tools(family, choice):
    form = FORMS[family]
    grammar = tool_grammar(form, TOOLS, choice)
    num_ended = 0
    for seed in range(12):
        text, is_whole = walk(grammar, seed)
        num_ended += is_whole
        if not is_whole:
            continue
        said, calls = calls_in(form, text)
        assert said == ""
        assert calls
        for name, arguments in calls:
            assert choice in ("required", name)
            jsonschema.validate(arguments, SCHEMAS[name])
        if choice != "required":
            assert len(calls) == 1
    assert num_ended > 6


@pytest.mark.parametrize("family", ["qwen", "llama"])
def test_what_the_template_writes_is_what_the_grammar_takes(family):
    form = FORMS[family]
    call = f'{{"name": "get_weather", "{form.arguments_key}": {{"city": "Ulm", "days": 2}}}}'
    text = form.before + call + form.after
    for choice in ("required", "get_weather"):
        assert takes(tool_grammar(form, TOOLS, choice), text)
    assert not takes(tool_grammar(form, TOOLS, "clock"), text)
    assert not takes(tool_grammar(form, TOOLS, "required"), text.replace("Ulm", "Rome"))
    assert not takes(tool_grammar(form, TOOLS, "required"), "Well, " + text)


@pytest.mark.parametrize(("family", "between"), [("qwen", "\n"), ("smollm", ", ")])
def test_required_is_one_call_or_more_unless_there_may_be_only_one(family, between):
    form, call = FORMS[family], '{"name": "clock", "arguments": {}}'
    if form.is_list:
        texts = {n: form.before + between.join([call] * n) + form.after for n in range(4)}
    else:
        texts = {n: between.join([form.before + call + form.after] * n) for n in range(4)}
    several = tool_grammar(form, TOOLS, "required")
    one = tool_grammar(form, TOOLS, "required", is_parallel=False)
    assert [takes(several, texts[n]) for n in texts] == [False, True, True, True]
    assert [takes(one, texts[n]) for n in texts] == [False, True, False, False]
    assert [len(calls_in(form, texts[n])[1]) for n in texts] == [0, 1, 2, 3]


def test_a_free_choice_has_no_grammar():
    for choice in ("auto", "none"):
        assert tool_grammar(FORMS["qwen"], TOOLS, choice) is None


def asked(**fields):
    return GenerationSpec(Chat([{"role": "user", "content": "x"}], tools=TOOLS, **fields))


def test_a_request_gets_the_grammar_and_the_parser_of_its_tools():
    form = FORMS["qwen"]
    for choice in ("auto", "required", "clock"):
        spec, make_parser = with_tools(asked(tool_choice=choice), form)
        assert spec.grammar == tool_grammar(form, TOOLS, choice)
        text = form.before + '{"name": "clock"}' + form.after
        _, (delta,) = make_parser().push(text, is_last=True)
        assert delta.name == "clock"
    _, make_parser = with_tools(asked(parallel_tool_calls=False), form)
    assert len(make_parser().push(text * 2, is_last=True)[1]) == 1
    for spec in (asked(tool_choice="none"), GenerationSpec("x")):
        assert with_tools(spec, None) == (spec, None)


def test_a_required_call_and_another_grammar_exclude_each_other():
    own = Grammar(GrammarKind.JSON_OBJECT)
    with pytest.raises(InvalidArgumentError, match="'required' and a grammar exclude each other"):
        with_tools(replace(asked(tool_choice="required"), grammar=own), FORMS["qwen"])
    assert with_tools(replace(asked(), grammar=own), FORMS["qwen"])[0].grammar == own


def test_a_schema_brings_no_options_of_its_own():
    wide = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"],
            "additionalProperties": False, "x-guidance": {"whitespace_flexible": True}}  # fmt: skip
    tool = {"type": "function", "function": {"name": "f", "parameters": wide}}
    grammar = tool_grammar(FORMS["llama"], [tool], "f")
    assert takes(grammar, '{"name": "f", "parameters": {"a": 1}}')
    assert not takes(grammar, '{"name": "f", "parameters": {"a":1}}')


def test_a_function_without_parameters_takes_none():
    grammar = tool_grammar(FORMS["llama"], [CLOCK], "clock")
    assert takes(grammar, '{"name": "clock", "parameters": {}}')
    assert not takes(grammar, '{"name": "clock", "parameters": {"a": 1}}')


@pytest.mark.parametrize("tags", ["text", "tokens", "special"])
def test_a_tag_is_written_as_its_token_where_it_has_one(tags):
    tokenizer = make(template=TEMPLATES["qwen"]) if tags != "tokens" else TOKENIZER
    if tags == "special":
        tokenizer.add_special_tokens({"additional_special_tokens": ["<tool_call>", "</tool_call>"]})
    form = TextEncoder(tokenizer).tool_format(None)
    assert form.is_special == (tags == "special")
    grammar = tool_grammar(form, TOOLS, "clock")
    ll_tokenizer = llguidance.LLTokenizer(tokenizer.backend_tokenizer.to_str(), eos_token=[END])
    text = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = matcher(grammar, ll_tokenizer)
    assert found.try_consume_tokens(ids) == len(ids)
    assert found.is_accepting()
    said, calls = calls_in(form, tokenizer.decode(ids, skip_special_tokens=True))
    assert (said, calls) == ("", [("clock", {})])
