"""What a caller asks for is either fit to be queued or refused with the reason."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from redmux.errors import InvalidArgumentError
from redmux_adapters import PromptFormat, Turn
from redmux_server.services.chat import MAX_MESSAGES
from redmux_server.services.spec import Chat, GenerationSpec
from redmux_server.services.validation import (
    MAX_STOP_BYTES,
    MAX_STOP_TOKEN_IDS,
    MAX_STOPS,
    Validator,
)

VOCAB, CONTEXT = 100, 64
VALIDATOR = Validator(VOCAB, CONTEXT)
LONE = "\ud800"  # half a surrogate pair: a str that is not encodable


def check(spec, num_prompt_tokens=5):
    """Every check of a request in the order of the service; returns what would be queued."""
    sampling = VALIDATOR.sampling(spec)
    VALIDATOR.stops(spec)
    VALIDATOR.rest(spec)
    VALIDATOR.prompt(spec.prompt)
    if isinstance(spec.prompt, list):
        num_prompt_tokens = len(spec.prompt)
    return sampling, VALIDATOR.max_tokens(spec, num_prompt_tokens)


REFUSED = {
    "temperature NaN": ({"temperature": math.nan}, "temperature is nan"),
    "temperature infinite": ({"temperature": math.inf}, "temperature is inf"),
    "temperature negative": ({"temperature": -0.1}, r"temperature is -0\.1"),
    "temperature too high": ({"temperature": 100.5}, r"temperature is 100\.5"),
    "top_p zero": ({"top_p": 0.0}, r"top_p is 0\.0"),
    "top_p negative": ({"top_p": -1.0}, r"top_p is -1\.0"),
    "top_p above one": ({"top_p": 1.01}, r"top_p is 1\.01"),
    "top_p NaN": ({"top_p": math.nan}, "top_p is nan"),
    "top_k negative": ({"top_k": -3}, "top_k is -3"),
    "seed negative": ({"seed": -1}, "seed is -1"),
    "seed too large": ({"seed": 1 << 64}, "seed is 18446744073709551616"),
    "too many stops": ({"stop": ["x"] * 17}, "stop has 17 strings; limit 16"),
    "long stop": ({"stop": ["ok", "x" * 129]}, "129 bytes"),
    "long stop in bytes": ({"stop": ["é" * 65]}, "130 bytes"),
    "empty stop": ({"stop": ["a", ""]}, "0 bytes"),
    "too many stop ids": ({"stop_token_ids": [1] * 65}, "stop_token_ids has 65 tokens; limit 64"),
    "stop id beyond the vocabulary": (
        {"stop_token_ids": [3, VOCAB]}, r"stop_token_ids\[1\] = 100 is outside \[0, 100\)",
    ),
    "stop id negative": ({"stop_token_ids": [-1]}, r"stop_token_ids\[0\] = -1"),
    "prompt id beyond the vocabulary": (
        {"prompt": [1, 2, 100]}, r"token_ids\[2\] = 100 is outside \[0, 100\)",
    ),
    "prompt id negative": ({"prompt": [1, -7]}, r"token_ids\[1\] = -7"),
    "no prompt ids": ({"prompt": []}, "prompt is empty"),
    "text too long": ({"prompt": "x" * 1025}, "1025 bytes; limit 1024"),
    "text too long in bytes": ({"prompt": "é" * 513}, "1026 bytes"),
    "chat too long": (
        {"prompt": Chat([{"role": "user", "content": "x" * 600}] * 2)}, "1200 bytes",
    ),
    "prompt fills the context": ({"prompt": [1] * CONTEXT}, "64 tokens"),
    "prompt exceeds the context": ({"prompt": [1] * 90}, "token_ids has 90 tokens; limit 64"),
    "max_tokens zero": ({"max_tokens": 0}, "max_tokens is 0"),
    "choices of no completion": ({"max_tokens": 0, "prompt_logprobs": 0, "n": 2}, "n is 2"),
    "a prompt of one token to score": (
        {"prompt": [1], "max_tokens": 0, "prompt_logprobs": 0}, "one token",
    ),
    "min_tokens above max_tokens": (
        {"max_tokens": 3, "min_tokens": 4}, "min_tokens is 4, must be at most max_tokens",
    ),
    "min_tokens negative": ({"min_tokens": -1}, "min_tokens is -1"),
    "min_p above one": ({"min_p": 1.1}, r"min_p is 1\.1, must be from 0 to 1"),
    "min_p NaN": ({"min_p": math.nan}, "min_p is nan"),
    "typical_p zero": ({"typical_p": 0.0}, r"typical_p is 0\.0"),
    "presence_penalty": ({"presence_penalty": 2.5}, r"presence_penalty is 2\.5, must be from -2"),
    "frequency_penalty": ({"frequency_penalty": -3.0}, r"frequency_penalty is -3\.0"),
    "repetition_penalty zero": ({"repetition_penalty": 0.0}, r"repetition_penalty is 0\.0"),
    "no_repeat_ngram": ({"no_repeat_ngram": -1}, "no_repeat_ngram is -1"),
    "bias of no token": ({"logit_bias": {VOCAB: 1.0}}, r"logit_bias\[0\] = 100 is outside"),
    "bias too strong": ({"logit_bias": {3: 101.0}}, r"logit_bias\[3\] is 101\.0, must"),
    "bias NaN": ({"logit_bias": {3: math.nan}}, r"logit_bias\[3\] is nan"),
    "allowed token": ({"allowed_token_ids": [VOCAB]}, r"allowed_token_ids\[0\] = 100"),
    "bad token": ({"bad_token_ids": [-1]}, r"bad_token_ids\[0\] = -1"),
    "bad word empty": ({"bad_words": ["x", ""]}, r"bad_words\[1\] has 0 bytes"),
    "too many bad words": ({"bad_words": ["x"] * 129}, "bad_words has 129 strings; limit 128"),
    "top_logprobs": ({"logprobs": True, "top_logprobs": 21}, "top_logprobs is 21, must"),
    "top_logprobs alone": ({"top_logprobs": 2}, "top_logprobs is 2 without logprobs"),
    "prompt_logprobs": ({"prompt_logprobs": 21}, "prompt_logprobs is 21"),
    "priority": ({"priority": 101}, "priority is 101, must be from -100 to 100"),
    "timeout zero": ({"timeout_s": 0.0}, r"timeout_s is 0\.0"),
    "timeout infinite": ({"timeout_s": math.inf}, "timeout_s is inf"),
    "regex of another kind": ({"stop_regex": r"(a)\1"}, "no pattern of RE2: invalid escape"),
    "regex unbalanced": ({"stop_regex": "a)(b"}, "no pattern of RE2"),
    "regex too long": ({"stop_regex": "x" * 513}, "513 bytes; limit 512"),
    "regex too large": ({"stop_regex": r"\pL{900}"}, "stop_regex"),
    "regex of nothing": ({"stop_regex": "a*"}, "matches an empty text"),
    "regex that looks ahead": ({"stop_regex": r"[$]a\b"}, r"has \\b at 4"),
    "regex of half a character": ({"stop_regex": LONE}, "no pattern of RE2"),
    "max_tokens negative": ({"max_tokens": -5}, "max_tokens is -5"),
    "max_tokens beyond the context": ({"max_tokens": 60}, "max_tokens is 60"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_with_field_and_value(case):
    values, message = REFUSED[case]
    with pytest.raises(InvalidArgumentError, match=message):
        check(GenerationSpec(**{"prompt": "hello"} | values))


ACCEPTED = {
    "temperature zero": {"temperature": 0.0},
    "temperature tiny": {"temperature": 5e-324},
    "temperature at its limit": {"temperature": 100.0},
    "top_p one": {"top_p": 1.0},
    "top_p tiny": {"top_p": 1e-9},
    "top_k zero": {"top_k": 0},
    "top_k beyond the vocabulary": {"top_k": 10**9},
    "seed zero": {"seed": 0},
    "largest seed": {"seed": (1 << 64) - 1},
    "most stops": {"stop": ["x"] * MAX_STOPS},
    "longest stop": {"stop": ["x" * MAX_STOP_BYTES]},
    "most stop ids": {"stop_token_ids": [VOCAB - 1] * MAX_STOP_TOKEN_IDS},
    "longest text": {"prompt": "x" * 1024},
    "empty text": {"prompt": ""},
    "prompt that leaves room for one": {"prompt": [0] * (CONTEXT - 1)},
    "max_tokens that fill the context": {"prompt": [0] * 4, "max_tokens": CONTEXT - 4},
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_it_is_accepted(case):
    check(GenerationSpec(**{"prompt": "hello"} | ACCEPTED[case]))


def test_what_is_unset_gets_its_default():
    sampling, max_tokens = check(GenerationSpec("hello"))
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.0, 1.0, 0)
    assert max_tokens == CONTEXT - 5


def test_an_unset_seed_is_another_each_time():
    seeds = {VALIDATOR.sampling(GenerationSpec("hello")).seed for _ in range(20)}
    assert len(seeds) == 20


def test_what_is_set_is_kept():
    spec = GenerationSpec("x", temperature=0.7, top_p=0.9, top_k=7, seed=3, max_tokens=11)
    sampling, max_tokens = check(spec)
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.7, 0.9, 7)
    assert (sampling.seed, max_tokens) == (3, 11)


def test_a_top_k_beyond_the_vocabulary_is_the_vocabulary():
    assert VALIDATOR.sampling(GenerationSpec("x", top_k=10**9)).top_k == VOCAB


@pytest.mark.parametrize(
    "spec",
    [
        GenerationSpec(LONE * 400), GenerationSpec("x", stop=[LONE * 80]),
        GenerationSpec(Chat([{"role": "user", "content": LONE * 400}])),
    ],
)  # fmt: skip
def test_half_surrogates_are_counted_and_not_a_crash(spec):
    """Three bytes each: too long here, which takes counting them."""
    with pytest.raises(InvalidArgumentError, match="bytes"):
        check(spec)


NUMBERS = st.one_of(st.none(), st.floats(0, 1), st.floats(), st.integers(-(2**70), 2**70))
INTS = st.one_of(st.integers(0, 50), st.integers(-(2**70), 2**70), st.integers(-2, 120))
IDS = st.lists(st.integers(0, VOCAB - 1), max_size=70) | st.lists(INTS, max_size=70)
TEXTS = st.text(st.characters(), max_size=200)  # surrogates included
SPECS = st.builds(
    GenerationSpec,
    prompt=st.one_of(
        TEXTS, IDS,
        st.lists(st.fixed_dictionaries({"role": TEXTS, "content": TEXTS}), max_size=4).map(Chat),
    ),
    temperature=NUMBERS, top_p=NUMBERS, top_k=st.none() | INTS,
    seed=st.none() | INTS, max_tokens=st.none() | INTS,
    stop=st.lists(st.text(st.characters(), min_size=1, max_size=9), max_size=3)
    | st.lists(TEXTS, max_size=20),
    stop_token_ids=IDS,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(SPECS, st.integers(0, 100))
def test_any_request_is_refused_with_a_typed_error_or_fit_to_run(spec, num_prompt_tokens):
    try:
        sampling, max_tokens = check(spec, num_prompt_tokens)
    except InvalidArgumentError:
        return
    assert 0 <= sampling.temperature <= 100
    assert 0 < sampling.top_p <= 1
    assert 0 <= sampling.top_k <= VOCAB
    assert 0 <= sampling.seed < 2**64
    assert 1 <= max_tokens < CONTEXT
    assert all(0 <= t < VOCAB for t in spec.stop_token_ids)
    assert all(0 < len(s) <= MAX_STOP_BYTES for s in spec.stop)
    if isinstance(spec.prompt, list):
        assert all(0 <= t < VOCAB for t in spec.prompt)
        assert 0 < len(spec.prompt) <= CONTEXT - max_tokens


@pytest.mark.parametrize(
    ("number", "content", "turn", "message"),
    [
        (MAX_MESSAGES + 1, "", "", f"{MAX_MESSAGES + 1} messages; limit {MAX_MESSAGES}"),
        (3, "x" * 400, "", "1200 bytes; limit 1024"),
        (3, "", "x" * 200, "1200 bytes; limit 1024"),
        (3, "\u00e9" * 100, "\u00e9" * 50, "1200 bytes; limit 1024"),
    ],
)
def test_a_chat_is_counted_with_what_its_format_adds(number, content, turn, message):
    form = PromptFormat(user=Turn(turn, turn), assistant=Turn("", ""))
    chat = Chat([{"role": "user", "content": content}] * number)
    with pytest.raises(InvalidArgumentError, match=message):
        VALIDATOR.prompt(chat, form)
    VALIDATOR.prompt(Chat(chat.messages[:1]), form)
