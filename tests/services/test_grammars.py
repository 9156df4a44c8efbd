"""Grammars as services give them out: what is refused and with which words, what is kept."""

import asyncio
import json

import numpy as np
import pytest
import torch
from grammars_at_hand import allowed
from tokenizers_at_hand import EOS, PLAIN, SPECIAL, make

from redmux.errors import FailedPreconditionError, InvalidArgumentError
from redmux_server.engine.grammar import MaskThread, bar_tokens
from redmux_server.fair_thread import FairThread
from redmux_server.models.text import TextCodec
from redmux_server.services import grammar as grammar_module
from redmux_server.services.grammar import Grammars
from redmux_server.services.grammar_source import (
    MAX_BYTES,
    MAX_DEPTH,
    MAX_KEYS,
    MAX_PROPERTIES,
    MAX_VALUES,
)
from redmux_server.services.spec import GenerationSpec, Grammar, GrammarKind
from redmux_server.services.validation import Validator

SCHEMA, OBJECT, REGEX = GrammarKind.JSON_SCHEMA, GrammarKind.JSON_OBJECT, GrammarKind.REGEX
CHOICE, LARK = GrammarKind.CHOICE, GrammarKind.LARK
TOKENIZER = make("bytes")
CODEC = TextCodec(TOKENIZER, None)


class Some:
    """Grammars with a thread of their own, and how often they compiled."""

    def __init__(self, codec=CODEC, num_logits=320):
        self.thread = FairThread("grammars")
        self.grammars = Grammars(codec, num_logits, self.thread)

    def matcher(self, kind, source="", tenant=""):
        return asyncio.run(self.grammars.matcher(Grammar(kind, source), tenant))


@pytest.fixture(scope="module")
def some():
    return Some()


@pytest.fixture
def compiled(monkeypatch):
    """The grammars that are compiled from now on."""
    found = []
    compile_it = grammar_module._compiled

    def count(grammar, tokenizer):
        found.append(grammar)
        return compile_it(grammar, tokenizer)

    monkeypatch.setattr(grammar_module, "_compiled", count)
    return found


def accepts(matcher, text):
    """Whether the text is a whole one of the grammar."""
    state = matcher.copy().state
    ids = CODEC.encode(text).ids if text else []
    return state.try_consume_tokens(ids) == len(ids) and state.is_accepting()


@pytest.mark.parametrize(
    ("kind", "source", "whole", "other"),
    [
        (OBJECT, "", ['{}', '{"a": [1, 2], "b": {"c": null}}'], ["[]", "1", "", '{"a"']),
        (REGEX, "ab|c+", ["ab", "c", "ccc"], ["a", "abc", ""]),
        (REGEX, "^ab$", ["ab"], ["aab"]),
        (REGEX, "a/b\\/", ["a/b/"], ["a"]),
        (REGEX, "\\d\\w", ["1a", "1\u00e9"], ["\u0663a"]),
        (REGEX, ".", ["a", "\u00e9"], ["\n"]),
        (REGEX, "", [""], ["a"]),
        (CHOICE, '["a", "ab", "c d"]', ["a", "ab", "c d"], ["abc", "c", ""]),
        (CHOICE, json.dumps(['"', "\\", "\n", "/", "\x7f", "\U0001f600", "%json {}"]),
         ['"', "\\", "\n", "/", "\x7f", "\U0001f600", "%json {}"], ["a"]),
        (CHOICE, '["", "a"]', ["", "a"], ["b"]),
        (LARK, 'start: "a" b? // "x"\nb: /[0-9]/', ["a", "a1"], ["b", "a12"]),
        (LARK, 'start: "n" %json {"type": "array", "items": {"type": "integer"}} "#"',
         ["n[1, 2]#"], ["n[1,2]#", "n[ 1]#"]),
        (LARK, 'start: "%json {" /x\\/"/ # %json {', ['%json {x/"'], ["x"]),
    ],
)  # fmt: skip
def test_a_grammar_takes_its_texts_and_no_others(some, kind, source, whole, other):
    matcher = some.matcher(kind, source)
    assert [text for text in whole if not accepts(matcher, text)] == []
    assert [text for text in other if accepts(matcher, text)] == []


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "additionalProperties": {"type": "array"}},
        {"const": {"a": [1, 2], "b": {}}},
        {"properties": {"a": {"type": "array"}, "b": {"type": "object"}}, "type": "object"},
    ],
)
def test_whitespace_is_that_of_json_dumps(some, schema):
    matcher = some.matcher(SCHEMA, json.dumps(schema))
    value = {"a": [1, 2], "b": {}} if "additionalProperties" not in schema else {"a": [1, [2]]}
    assert accepts(matcher, json.dumps(value))
    assert not accepts(matcher, json.dumps(value, indent=1))
    assert not accepts(matcher, json.dumps(value, separators=(",", ":")))


@pytest.mark.parametrize("kind", [SCHEMA, LARK])
def test_no_schema_sets_an_option_of_the_server(some, kind):
    def source(**schema):
        return ("start: %json " if kind is LARK else "") + json.dumps(schema)

    lenient = {"x-guidance": {"lenient": True, "coerce_one_of": True}}
    with pytest.raises(InvalidArgumentError, match="uniqueItems"):
        some.matcher(kind, source(type="array", uniqueItems=True, **lenient))
    with pytest.raises(InvalidArgumentError, match="oneOf"):
        some.matcher(kind, source(oneOf=[{"type": "integer"}, {"type": "number"}], **lenient))
    loose = {"x-guidance": {"whitespace_flexible": True, "whitespace_pattern": "x+"}}
    matcher = some.matcher(kind, source(type="array", **loose))
    assert accepts(matcher, "[1, 2]")
    assert not accepts(matcher, "[1,  2]")
    assert not accepts(matcher, "[1,x2]")


def test_the_servers_own_options_of_lark_are_refused_by_name(some):
    for source in ('%llguidance {"no_forcing": false}\nstart: "a"',
                   "start: b\nb[temperature=0.5]: /a/"):  # fmt: skip
        with pytest.raises(InvalidArgumentError, match="is the server's to set; leave it out"):
            some.matcher(LARK, source)
    some.matcher(LARK, 'start: "%llguidance temperature=" // %llguidance temperature=\n')


REFUSALS = {
    "no JSON": (SCHEMA, "[1", "json_schema is no JSON: Expecting ',' delimiter"),
    "no object": (SCHEMA, "[1]", "the JSON schema is [1], not an object"),
    "true": (SCHEMA, "true", "the JSON schema is true, not an object"),
    "NaN": (SCHEMA, '{"minimum": NaN}', "has a number that JSON has not"),
    "huge number": (SCHEMA, '{"minimum": 1e999}', "has a number that JSON has not"),
    "nested without end": (SCHEMA, "[" * 30_000, "json_schema is no JSON: maximum recursion"),
    "no type": (SCHEMA, '{"type": "foo"}', "json_schema: Invalid type: foo"),
    "empty enum": (SCHEMA, '{"enum": []}', "Unsatisfiable schema"),
    "bounds crossed": (SCHEMA, '{"type": "integer", "minimum": 5, "maximum": 1}',
                       "minimum (5) is greater than maximum (1)"),
    "itself": (SCHEMA, '{"$ref": "#"}', "json_schema: no text satisfies it"),
    "half a pair": (SCHEMA, '{"const": "\\ud800"}', "json_schema: failed to parse"),
    "lookahead": (REGEX, "(?=a)b", "regex: look-around, including look-ahead and look-behind, is "
                                   "not supported"),
    "boundary": (REGEX, "\\bq", "regex: lookarounds not supported yet"),
    "group": (REGEX, "(", "regex: unclosed group"),
    "backslash": (REGEX, "a\\", "regex ends with a lone backslash"),
    "backreference": (REGEX, "(a)\\1", "regex: backreferences are not supported"),
    "surrogate": (REGEX, "\ud800", "regex is no valid Unicode"),
    "no choice": (CHOICE, "[]", "the list of choices is empty; give at least one"),
    "no texts": (CHOICE, '["a", 1]', "choice is no JSON list of texts"),
    "no list": (CHOICE, '"a"', "choice is no JSON list of texts"),
    "no JSON list": (CHOICE, "a", "choice is no JSON list of texts"),
    "choice of half a pair": (CHOICE, '["\\ud800"]', "is no valid Unicode"),
    "many choices": (CHOICE, json.dumps(["a"] * (MAX_VALUES + 1)), f"limit {MAX_VALUES}"),
    "unknown rule": (LARK, 'start: "a" b\nb: foo', 'lark: at 2(4): unknown name: "foo"'),
    "empty": (LARK, "", "lark: "),
    "schema in lark": (LARK, 'start: %json {"not": {}}', 'Unimplemented keys: ["not"]'),
    "no schema in lark": (LARK, "start: %json {a}", "lark: %json is followed by no JSON"),
    "levels": (SCHEMA, '{"items":' * MAX_DEPTH + "{}" + "}" * MAX_DEPTH,
               f"{MAX_DEPTH + 1} levels; limit {MAX_DEPTH}"),
    "properties": (SCHEMA, json.dumps(
        {"properties": {str(i): {} for i in range(MAX_PROPERTIES + 1)}}),
                   f"limit {MAX_PROPERTIES}"),
    "keys": (SCHEMA, json.dumps({"anyOf": [{"a": 1}] * MAX_KEYS}), f"limit {MAX_KEYS}"),
    "values": (SCHEMA, json.dumps({"enum": [1] * (MAX_VALUES + 1)}), f"limit {MAX_VALUES}"),
    "multiples": (SCHEMA, '{"multipleOf": 9.9991e1, "items": {"multipleOf": 1}}',
                  "99992 as the sum of its multipleOf (without decimal point); limit 20000"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_no_grammar_is_refused_in_one_line_that_says_why(some, name):
    kind, source, words = REFUSALS[name]
    with pytest.raises(InvalidArgumentError) as caught:
        some.matcher(kind, source)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_grammars_are_bounded_and_exclude_what_goes_on_behind_their_end():
    validator = Validator(vocab_size=300, max_context=64)
    validator.grammar(GenerationSpec("a", grammar=Grammar(REGEX, "\u00e9" * (MAX_BYTES // 2))))
    with pytest.raises(InvalidArgumentError, match=f"regex has {MAX_BYTES + 1} bytes; limit"):
        validator.grammar(GenerationSpec("a", grammar=Grammar(REGEX, "a" * (MAX_BYTES + 1))))
    with pytest.raises(InvalidArgumentError, match="ignore_eos goes on behind the end"):
        validator.grammar(GenerationSpec("a", grammar=Grammar(OBJECT), ignore_eos=True))
    validator.grammar(GenerationSpec("a", ignore_eos=True))


@pytest.mark.parametrize("regex", ["x(a{1000}){1000}", "xa{1000000}", "x(a{300}){300}"])
def test_what_a_grammar_forces_is_not_computed_to_its_end(some, regex):
    """Which would take seconds of the engine, and end in an error."""
    matcher = some.matcher(REGEX, regex).copy()
    for token_id in CODEC.encode("xa").ids:
        matcher.take(token_id)
        assert not matcher.error


@pytest.mark.parametrize("num_logits", [len(TOKENIZER), 287, 288, 289, 319, 320, 321])
def test_masks_are_as_wide_as_the_logits(num_logits):
    matcher = Some(num_logits=num_logits).matcher(REGEX, "[ab]{3}").copy()
    first = allowed(matcher)
    matcher.take(first[0])
    MaskThread().begin([matcher]).result()
    assert allowed(matcher) == first
    bar_tokens(logits := torch.zeros(1, num_logits), [0], [matcher.mask])
    assert logits[0].isfinite().nonzero()[:, 0].tolist() == first


def test_special_and_padded_tokens_are_never_allowed(some):
    special = {*SPECIAL.values(), *(TOKENIZER.convert_tokens_to_ids(text) for text in PLAIN[:3])}
    matcher = some.matcher(REGEX, "(?s:.*)")
    assert set(allowed(matcher)) & (special | {*range(len(TOKENIZER), 10_000)}) == {EOS}


def test_a_grammar_is_compiled_once_for_a_tenant(some, compiled):
    source = '["kept"]'
    assert some.matcher(CHOICE, source, "a") is some.matcher(CHOICE, source, "a")
    some.matcher(CHOICE, source, "b")
    some.matcher(REGEX, source, "a")
    assert [grammar.kind for grammar in compiled] == [CHOICE, CHOICE, REGEX]


async def test_those_who_ask_at_once_wait_for_one_compiling(compiled):
    some = Some()
    grammar = Grammar(REGEX, "together")
    asking = [asyncio.create_task(some.grammars.matcher(grammar, "")) for _ in range(5)]
    await asyncio.sleep(0)
    asking[0].cancel()  # and none of them loses by who leaves
    found = await asyncio.gather(*asking, return_exceptions=True)
    assert isinstance(found[0], asyncio.CancelledError)
    assert len({id(matcher) for matcher in found[1:]}) == 1
    assert len(compiled) == 1


def test_refusals_are_not_kept(some, compiled):
    for _ in range(2):
        with pytest.raises(InvalidArgumentError):
            some.matcher(REGEX, "(not kept")
    assert len(compiled) == 2


def test_the_grammars_used_last_are_kept(monkeypatch, compiled):
    monkeypatch.setattr(grammar_module, "MAX_KEPT", 2)
    some = Some()
    for source in "abacab":  # c puts out b, then b is compiled again and puts out c
        some.matcher(REGEX, source)
    assert [grammar.source for grammar in compiled] == ["a", "b", "c", "b"]


def test_matchers_of_one_grammar_do_not_move_each_other(some):
    kept = some.matcher(REGEX, "ab|cd")
    first = allowed(kept)
    kept.copy().take(first[0])
    assert allowed(some.matcher(REGEX, "ab|cd")) == first
    fresh = kept.copy()
    fresh.fill(np.frombuffer(fresh.state.compute_bitmask(), np.uint8))
    assert allowed(fresh) == first


@pytest.mark.parametrize("kind", ["metaspace first", "unigram", "prepended"])
def test_a_tokenizer_that_cannot_be_read_is_the_reason_for_a_refusal(kind):
    some = Some(TextCodec(make(kind), None))
    with pytest.raises(FailedPreconditionError, match="its tokenizer cannot be read: ") as caught:
        some.matcher(OBJECT)
    assert "structured output is not available with this model" in str(caught.value)


def test_a_model_without_an_end_serves_no_grammar():
    codec = TextCodec(make("bytes"), None)
    codec.eos_token_ids = frozenset()
    with pytest.raises(FailedPreconditionError, match="it has no end-of-text token"):
        Some(codec).matcher(OBJECT)


def test_a_tokenizer_of_another_library_is_told():
    codec = TextCodec(make("bytes"), None)
    codec.tokenizer_json = lambda: None
    with pytest.raises(FailedPreconditionError, match="none of the tokenizers library"):
        Some(codec).matcher(OBJECT)
