"""Arguments of a wrong name, kind or range: each is named, and nothing is sent."""

import pytest

import redmux

WRONG = {
    "max_tokens": ("5", "max_tokens is '5', must be a whole number up to 2147483647"),
    "negative": (-1, "seed is -1, must be a whole number from 0 to 18446744073709551615"),
    "temperature": ("hot", "temperature is 'hot', must be a number"),
    "top_p": ([1], r"top_p is \[1\], must be a number"),
    "top_k": (2.5, "top_k is 2.5, must be a whole number"),
    "seed": (
        2**64,
        "seed is 18446744073709551616, must be a whole number from 0",
    ),
    "stop": ([b"\xff"], r"stop\[0\] is b'.xff', must be a text"),
    "no list": (5, "stop is 5, must be a list of texts"),
    "stop_token_ids": ([1, "2"], r"stop_token_ids\[1\] is '2', must be a whole number"),
    "ignore_eos": ("yes", "ignore_eos is 'yes', must be True or False"),
    "logprobs": ("all", "logprobs is 'all', must be True or False"),
    "adapter": (3, "adapter is 3, must be a text"),
}
NAME_OF = {"negative": "seed", "no list": "stop"}


@pytest.mark.parametrize("case", WRONG)
def test_an_option_that_does_not_fit_is_named_with_what_would(client, server, case):
    value, message = WRONG[case]
    options = {NAME_OF.get(case, case): value}
    with pytest.raises(redmux.InvalidArgumentError, match=message):
        client.generate("Hi", **options)
    with pytest.raises(redmux.InvalidArgumentError, match=message):
        client.stream("Hi", **options)
    assert server.calls == []


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("model", "did you mean 'adapter'?"),
        ("messages", "did you mean 'prompt'?"),
        ("max_new_tokens", "did you mean 'max_tokens'?"),
        ("temprature", "did you mean 'temperature'?"),
        ("zzz", "known are adapter, max_tokens"),
        ("best_of", "did you mean 'n'?"),
    ],
)
def test_a_name_that_is_no_argument_is_told_with_the_one_that_is_meant(client, name, advice):
    for call in (client.generate, client.stream):
        with pytest.raises(TypeError) as caught:
            call("Hi", **{name: "x"})
        assert f"unexpected keyword argument {name!r}; {advice}" in str(caught.value)
        assert "generation()" not in str(caught.value)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (["a", "b"], "one call takes one prompt, so make a call for each"),
        ([1, 2**40], r"prompt\[1\] is 1099511627776, must be a whole number"),
        ("\ud800", "prompt is .*, must be a text"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "image_url"}]}],
            r"prompt\[0\]: content\[1\] is \{.*; only parts of type text are served",
        ),
        (
            [{"role": "user", "content": "Hi"}, {"role": "user"}],
            r"prompt\[1\]: a chat message has the keys",
        ),
        ([{"role": None, "content": "Hi"}], r"prompt\[0\]: role is None, must be a text"),
    ],
)
def test_a_prompt_of_a_wrong_kind_is_told_with_its_place(client, server, prompt, message):
    for call in (client.generate, client.stream, client.score):
        with pytest.raises(redmux.InvalidArgumentError, match=message):
            call(prompt)
    assert server.calls == []


def test_other_calls_name_their_arguments_too(client, server):
    cases = {
        "normalize is 'l2', must be True or False": lambda: client.embed(["Hi"], normalize="l2"),
        "adapter is 3, must be a text": lambda: client.embed(["Hi"], adapter=3),
        "inputs is int; give a list of inputs": lambda: client.embed(3),
        "prompt_logprobs is 'x', must be True": lambda: client.score("Hi", prompt_logprobs="x"),
        "replace is 'x', must be True or False": lambda: client.adapters.put("a", b"", replace="x"),
    }
    for message, call in cases.items():
        with pytest.raises(redmux.InvalidArgumentError, match=message):
            call()
    assert server.calls == []


def test_a_long_value_is_not_repeated_whole(client):
    with pytest.raises(redmux.InvalidArgumentError) as caught:
        client.generate("Hi", temperature="x" * 100_000)
    assert len(caught.value.message) < 200
