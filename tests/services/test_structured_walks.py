"""Random walks over what schemas of every kind allow: what is finished parses and is valid."""

import asyncio
import json
import random
from fractions import Fraction

import jsonschema
import numpy as np
import pytest
from schemas_of_every_kind import REFUSED, SERVED
from tokenizers_at_hand import EOS, make

from redmux.errors import InvalidArgumentError
from redmux_adapters import load_base
from redmux_server.fair_thread import FairThread
from redmux_server.models.text import TextCodec
from redmux_server.services.grammar import Grammars
from redmux_server.services.spec import Grammar, GrammarKind

LONGEST = 96  # tokens of a walk
CLOSING = {'"', "}", "]", "0", ":", "@", "."}


class Walker:
    """Draws tokens as a model without any idea would, of those that a grammar allows."""

    def __init__(self, codec, vocab_size):
        self.codec = codec
        self.vocab_size = vocab_size
        self.compiling = FairThread("grammars")
        self.grammars = Grammars(codec, vocab_size, self.compiling)
        closing = [
            i for i in range(vocab_size) if codec.decode([i]) in ('"', "}", "]", "0", ":", "@", ".")
        ]
        self.closing = sorted({*closing, *codec.eos_token_ids})

    def matcher(self, schema):
        grammar = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema))
        return asyncio.run(self.grammars.matcher(grammar, ""))

    def walk(self, matcher, random):
        """The text of one walk, or None if it did not end."""
        matcher, ids = matcher.copy(), []
        hurries = random.random() < 0.5
        while len(ids) < LONGEST:
            if matcher.mask is None:
                matcher.fill(np.frombuffer(matcher.state.compute_bitmask(), np.uint8))
            bits = np.unpackbits(matcher.mask, bitorder="little")
            assert not matcher.error
            assert bits.any()
            assert not bits[self.vocab_size :].any()
            closing = [i for i in self.closing if bits[i]]
            token_id = int(random.choice(closing if hurries and closing else bits.nonzero()[0]))
            if token_id in self.codec.eos_token_ids:
                return self.codec.decode(ids)
            ids.append(token_id)
            matcher.take(token_id)
            if matcher.is_complete:
                return self.codec.decode(ids)
        return None


def check(schema, text):
    if schema.get("multipleOf") == 0.01:  # which jsonschema computes in floats
        assert (Fraction(text) * 100).denominator == 1
        return
    if schema.get("format") in ("date", "date-time", "time"):  # which Python has no words for:
        text = text.replace("0000-", "2000-").replace(":60", ":59")  # year 0, leap seconds
        text = text.replace("-02-29", "-02-28")  # and llguidance takes every year for a leap year
    value = json.loads(text)
    if schema.get("format") == "hostname" and len(value) > 253:
        return  # llguidance bounds the labels alone
    try:
        jsonschema.validate(
            value, schema, jsonschema.Draft202012Validator,
            format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER,
        )  # fmt: skip
    except OverflowError:
        assert "multipleOf" in schema  # which it cannot tell of huge numbers


def walks(walker, name, number):
    matcher = walker.matcher(SERVED[name])
    texts = [walker.walk(matcher, random.Random(f"{name} {i}")) for i in range(number)]
    finished = [text for text in texts if text is not None]
    for text in finished:
        check(SERVED[name], text)
    return finished


@pytest.fixture(scope="module")
def walker():
    tokenizer = make("bytes")
    assert tokenizer.eos_token_id == EOS
    return Walker(TextCodec(tokenizer, None), len(tokenizer) + 5)


@pytest.fixture(scope="module")
def real_walker():
    model, tokenizer = load_base("smollm2")
    return Walker(TextCodec(tokenizer, model.generation_config), model.config.vocab_size)


@pytest.mark.parametrize("name", SERVED)
def test_a_finished_text_parses_and_is_valid(walker, name):
    assert walks(walker, name, 12)


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.parametrize("name", SERVED)
def test_a_finished_text_of_real_tokens_parses_and_is_valid(real_walker, name):
    assert walks(real_walker, name, 200)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_held_is_refused_by_name(walker, name):
    schema, words = REFUSED[name]
    with pytest.raises(InvalidArgumentError, match=words) as caught:
        walker.matcher(schema)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("json_schema: ")
