"""Options of sampling and stopping through the openai package, beside the same over gRPC."""

import pytest

GREEDY = [
    ({"presence_penalty": 1.9}, {}),
    ({"frequency_penalty": 1.9}, {}),
    ({"repetition_penalty": 1.8}, {}),
    ({"no_repeat_ngram_size": 1}, {"no_repeat_ngram": 1}),
    ({"allowed_token_ids": [66, 67, 68]}, {}),
    ({"stop_regex": "..."}, {}),
    ({"stop_regex": "...", "include_stop_str_in_output": True},
     {"stop_regex": "...", "include_stop_str": True}),
]  # fmt: skip
DRAWN = [
    {"temperature": 1.5, "seed": 1},
    {"temperature": 1.5, "seed": 2},
    {"temperature": 1.5, "seed": 1, "top_p": 0.5},
    {"temperature": 1.5, "seed": 1, "top_k": 2},
    {"temperature": 1.5, "seed": 1, "min_p": 0.3},
    {"temperature": 1.5, "seed": 1, "typical_p": 0.3},
]


@pytest.mark.parametrize(("fields", "theirs"), GREEDY, ids=str)
async def test_an_option_does_what_it_does_over_grpc(api, client, model, fields, theirs):
    plain = await api.completions.create(model=model, prompt="abc", max_tokens=24)
    here = await api.completions.create(model=model, prompt="abc", max_tokens=24, extra_body=fields)
    there = await client.generate("abc", max_tokens=24, **(theirs or fields))
    assert here.choices[0].text == there.text
    assert here.choices[0].text != plain.choices[0].text
    assert here.choices[0].finish_reason == there.finish_reason


async def test_the_bias_of_a_token_goes_by_its_id_as_text(api, client, model):
    first = (await client.generate("abc", max_tokens=1)).token_ids[0]
    here = await api.completions.create(
        model=model, prompt="abc", max_tokens=8, logit_bias={str(first): -100}
    )
    there = await client.generate("abc", max_tokens=8, logit_bias={first: -100})
    assert here.choices[0].text == there.text
    assert there.token_ids[0] != first
    for fields in ({"bad_token_ids": [first]}, {"stop_token_ids": [first], "min_tokens": 8}):
        barred = await api.completions.create(
            model=model, prompt="abc", max_tokens=8, extra_body=fields
        )
        assert barred.choices[0].text == here.choices[0].text
    stopped = await api.completions.create(
        model=model, prompt="abc", max_tokens=8, extra_body={"stop_token_ids": [first]}
    )
    assert (stopped.choices[0].finish_reason, stopped.choices[0].stop_reason) == ("stop", first)
    assert stopped.choices[0].text == ""


async def test_a_seed_draws_the_same_everywhere_and_each_choice_its_own(api, client, model):
    texts = set()
    for options in DRAWN:
        asked = {"model": model, "prompt": "abc", "max_tokens": 16, "n": 2, "extra_body": options}
        here = await api.completions.create(**asked)
        again = await api.completions.create(**asked)
        there = await client.generate("abc", max_tokens=16, n=2, **options)
        said = [choice.text for choice in here.choices]
        assert said == [choice.text for choice in again.choices]
        assert said == [choice.text for choice in there.choices]
        assert said[0] != said[1]
        texts.update(said)
    assert len(texts) == 2 * len(DRAWN)


async def test_a_chat_takes_the_same_options(api, client, model):
    asked = [{"role": "user", "content": "hi"}]
    options = {"presence_penalty": 1.9, "frequency_penalty": 0.5, "temperature": 1, "seed": 9}
    here = await api.chat.completions.create(
        model=model, messages=asked, max_completion_tokens=16, n=3, **options
    )
    there = await client.generate(asked, max_tokens=16, n=3, **options)
    assert [choice.message.content for choice in here.choices] == [
        choice.text for choice in there.choices
    ]
    assert here.usage.completion_tokens == 3 * there.usage.completion_tokens  # of one choice
