"""Options of generation through a real server, against plain transformers."""

import asyncio

import pytest
import torch
from reference import edited

import redmux
from redmux.errors import FailedPreconditionError, InvalidArgumentError
from redmux_server.models.kvcache import BLOCK
from redmux_server.services.choice import choice_seed

PROMPT = "A prompt that is longer than one block of the cache and than a step."
CONTEXT = 256


@torch.inference_mode()
def logprobs_of(base, ids, adapter=None):
    """[tokens, vocab], of what follows each token."""
    with edited(base.model, adapter.edits if adapter else {}):
        logits = base.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return torch.log_softmax(logits, -1)


def check_top(top, expected):
    """The likeliest tokens of a row: their numbers are the row's, and no token outside has more."""
    values = [value for _, value in top]
    assert values == sorted(values, reverse=True)
    assert values == pytest.approx(expected.topk(len(top)).values.tolist(), abs=2e-4)
    assert values == pytest.approx(expected[[i for i, _ in top]].tolist(), abs=2e-4)


async def test_the_likeliest_tokens_are_those_of_the_reference(base, client, put):
    adapter = base.adapter(1)
    await put("a", adapter)
    made = await client.generate(
        PROMPT, adapter="a", max_tokens=7, logprobs=True, top_logprobs=5, prompt_logprobs=3
    )
    prompt_ids = base.tokenizer(PROMPT)["input_ids"]
    expected = logprobs_of(base, [*prompt_ids, *made.token_ids], adapter)
    for i, token_id in enumerate(made.token_ids):
        row = expected[len(prompt_ids) - 1 + i]
        assert made.top_logprobs[i][0] == (token_id, made.logprobs[i])  # greedy
        check_top(made.top_logprobs[i], row)
        assert len(made.top_logprobs[i]) == 5
    assert list(made.prompt.token_ids) == prompt_ids[1:]
    for i, token_id in enumerate(prompt_ids[1:]):
        assert made.prompt.logprobs[i] == pytest.approx(expected[i, token_id].item(), abs=2e-4)
        check_top(made.prompt.top_logprobs[i], expected[i])


async def test_scores_of_the_prompt_change_nothing_and_are_those_of_score(client):
    plain = await client.generate(PROMPT, max_tokens=5)
    made = await client.generate(PROMPT, max_tokens=5, prompt_logprobs=0)
    alone = await client.generate(PROMPT, max_tokens=0, prompt_logprobs=0)
    scores = await client.score(PROMPT, prompt_logprobs=True)
    assert (made.text, made.token_ids, plain.prompt) == (plain.text, plain.token_ids, None)
    assert made.prompt == alone.prompt
    assert made.prompt.logprobs == scores.prompt.logprobs
    assert made.prompt.top_logprobs == ()
    assert (alone.text, alone.token_ids, alone.finish_reason) == ("", (), "length")
    assert alone.usage.prompt_tokens == len(PROMPT)
    assert alone.first_token_s is None


async def test_choices_have_the_bits_of_single_requests_with_their_seeds(base, client, put):
    await put("a", base.adapter(1))
    options = {"adapter": "a", "temperature": 1.0, "max_tokens": 12, "logprobs": True}
    made = await client.generate(PROMPT, n=4, seed=9, prompt_logprobs=2, **options)
    assert len({choice.token_ids for choice in made.choices}) == 4
    singles = await asyncio.gather(
        *(client.generate(PROMPT, seed=choice_seed(9, i), **options) for i in range(4))
    )
    for choice, single in zip(made.choices, singles, strict=True):
        assert (choice.text, choice.logprobs, choice.finish_reason) == (
            single.text, single.logprobs, single.finish_reason,
        )  # fmt: skip
    assert len(made.prompt.logprobs) == len(PROMPT) - 1
    texts, prompts, finishes = [""] * 4, [], []
    async for chunk in client.stream(PROMPT, n=4, seed=9, prompt_logprobs=2, **options):
        texts[chunk.index] += chunk.text
        prompts.append(chunk.prompt)
        finishes += [chunk.index] if chunk.finish_reason else []
    assert texts == [choice.text for choice in made.choices]
    assert sorted(finishes) == [0, 1, 2, 3]
    assert prompts[0] == made.prompt
    assert not any(prompts[1:])


async def test_the_prompt_of_choices_is_computed_once_but_for_its_end(client, server):
    metrics = server.metrics.tokens.labels
    before = metrics("prefill")._value.get()
    await client.generate(PROMPT, n=5, max_tokens=2, temperature=1.0, ignore_eos=True)
    tail = len(PROMPT) % BLOCK + 1  # and the first token of the choice
    assert metrics("prefill")._value.get() - before <= len(PROMPT) + 4 * tail


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"repetition_penalty": 1.4}, {"repetition_penalty": 1.4}),
        ({"no_repeat_ngram": 2}, {"no_repeat_ngram_size": 2}),
        ({"min_tokens": 30}, {"min_new_tokens": 30}),
        ({"bad_token_ids": [33, 70, 72, 82]}, {"bad_words_ids": [[33], [70], [72], [82]]}),
        ({"logit_bias": {70: 3.5, 40: -5}}, {"sequence_bias": [[[70], 3.5], [[40], -5.0]]}),
        (
            {"repetition_penalty": 0.7, "logit_bias": {70: 3.5}, "no_repeat_ngram": 3},
            {"repetition_penalty": 0.7, "sequence_bias": [[[70], 3.5]], "no_repeat_ngram_size": 3},
        ),
    ],
)  # fmt: skip
async def test_greedy_with_options_is_what_transformers_generates(base, client, ours, theirs):
    made = await client.generate(PROMPT, max_tokens=40, **ours)
    ids = base.tokenizer(PROMPT, return_tensors="pt")
    expected = base.model.generate(**ids, do_sample=False, max_new_tokens=40, **theirs)
    assert list(made.token_ids) == expected[0, len(PROMPT) :].tolist()


async def test_what_ends_a_completion_is_told_and_kept_if_wanted(client):
    whole = await client.generate(PROMPT, max_tokens=30, ignore_eos=True)
    stop = whole.text[8:10]
    end = whole.text.index(stop) + len(stop)
    cut = await client.generate(PROMPT, max_tokens=30, ignore_eos=True, stop=[stop])
    kept = await client.generate(
        PROMPT, max_tokens=30, ignore_eos=True, stop_regex=f"[{stop[0]}]\\x{{{ord(stop[1]):x}}}",
        include_stop_str=True,
    )  # fmt: skip
    assert (cut.text, cut.stop, cut.finish_reason) == (whole.text[: end - 2], stop, "stop")
    assert (kept.text, kept.stop, kept.stop_token_id) == (whole.text[:end], stop, None)
    token_id = whole.token_ids[5]
    first = whole.token_ids.index(token_id)
    by_token = await client.generate(
        PROMPT, max_tokens=30, ignore_eos=True, stop_token_ids=[token_id]
    )
    assert (by_token.stop, by_token.stop_token_id) == (None, token_id)
    assert by_token.token_ids == whole.token_ids[: first + 1]
    assert 0 < by_token.first_token_s <= by_token.total_s


async def test_special_tokens_have_a_text_if_wanted(client):
    options = {"max_tokens": 3, "allowed_token_ids": [0], "ignore_eos": True}
    assert (await client.generate(PROMPT, **options)).text == ""
    shown = await client.generate(PROMPT, skip_special_tokens=False, **options)
    assert shown.text == "<eos>" * 3


async def test_without_max_tokens_a_completion_may_fill_the_context(client):
    made = await client.generate(PROMPT, ignore_eos=True)
    assert made.finish_reason == "length"
    assert made.usage.prompt_tokens + made.usage.completion_tokens == CONTEXT


async def test_bad_words_never_come(base, client):
    letters = [base.tokenizer(letter)["input_ids"][0] for letter in "abcdef"]
    options = {"max_tokens": 30, "allowed_token_ids": letters}
    whole = await client.generate(PROMPT, **options)
    word = whole.text[7:9]
    made = await client.generate(PROMPT, bad_words=[word], **options)
    first = whole.text.index(word)
    assert word not in made.text
    assert made.text[: first + 1] == whole.text[: first + 1]


async def test_every_option_at_once_has_the_same_bits_in_company(base, server, client, put):
    assert (await server.info()).bit_identical
    await put("a", base.adapter(1))
    options = {
        "max_tokens": 20, "min_tokens": 4, "temperature": 0.9, "seed": 3, "top_k": 50, "top_p": 0.9,
        "min_p": 0.01, "typical_p": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.5,
        "repetition_penalty": 1.1, "no_repeat_ngram": 3, "logit_bias": {70: 1.0},
        "bad_words": ["the"], "bad_token_ids": [90], "logprobs": True, "top_logprobs": 3,
        "prompt_logprobs": 2, "stop_regex": "zz+q", "priority": 3, "n": 3,
    }  # fmt: skip
    alone = [await client.generate(PROMPT, adapter=name, **options) for name in (None, "a")]
    crowd = [client.generate("Once " * i, max_tokens=20, temperature=1.0) for i in range(1, 5)]
    both = [client.generate(PROMPT, adapter=name, **options) for name in (None, "a")]
    assert (await asyncio.gather(*both, *crowd))[:2] == alone


async def test_what_cannot_be_is_refused_with_its_reason(client):
    with pytest.raises(InvalidArgumentError, match=r"n is 65, must be from 1 to 64"):
        await client.generate("x", n=65)
    with pytest.raises(FailedPreconditionError, match="leave no token"):
        await client.generate("x", allowed_token_ids=[5], bad_token_ids=[5])


async def test_an_encoder_decoder_scores_no_prompt_and_has_choices(tmp_path_factory, start_server):
    from conftest import save_tiny_model
    from transformers import AutoModelForSeq2SeqLM, T5Config

    config = T5Config(
        vocab_size=260, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2,
        decoder_start_token_id=0, eos_token_id=0, pad_token_id=0, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    folder = save_tiny_model(tmp_path_factory.mktemp("t5"), config, kind=AutoModelForSeq2SeqLM)
    server = await start_server(model=str(folder), max_batch_tokens=128, max_context=96)
    async with redmux.AsyncClient(f"127.0.0.1:{server.port}") as client:
        with pytest.raises(InvalidArgumentError, match="encoder of the model reads the prompt"):
            await client.generate("x", prompt_logprobs=0)
        options = {"temperature": 1.0, "max_tokens": 8, "ignore_eos": True}
        made = await client.generate("some source", n=3, seed=4, **options)
        for i, choice in enumerate(made.choices):
            single = await client.generate("some source", seed=choice_seed(4, i), **options)
            assert choice.token_ids == single.token_ids
