"""Adapters that edit some of the tokens alone, against plain transformers edited at these alone."""

import asyncio

import pytest
import torch
from reference import edited, generate

from redmux import AsyncClient, InvalidArgumentError
from redmux_adapters import to_bytes
from redmux_server.models.kvcache import BLOCK

SYSTEM = "You are a ship's cook. Answer in one sentence and never mention the sea. "
PROMPT = SYSTEM + "What is it?"
OPTIONS = {"max_tokens": 10, "ignore_eos": True, "logprobs": True}
WHERE = ["all", "prompt", "generation", "after:cook."]


def positions(base, where, text=PROMPT):
    """The positions of a window, found by hand."""
    ids = base.tokenizer(text)["input_ids"]
    end = 10_000
    if where.startswith("after:"):
        before = text[: text.index(where[6:]) + len(where[6:])]
        return range(len(base.tokenizer(before)["input_ids"]) - 1, end)
    return {"all": range(end), "prompt": range(len(ids)), "generation": range(len(ids) - 1, end)}[
        where
    ]


def expected(base, adapter, where):
    ids = base.tokenizer(PROMPT)["input_ids"]
    found = generate(base.model, ids, 10, adapter.edits, where=positions(base, where))
    return tuple(found[0]), pytest.approx(found[1], abs=1e-3)


def bits(answer):
    return answer.token_ids, answer.logprobs


async def test_tokens_are_those_of_the_plain_model_edited_there_alone_alone_and_in_any_batch(
    base, client, put
):
    adapters = {where: base.adapter(3, apply=where) for where in WHERE}
    for number, adapter in enumerate(adapters.values()):
        await put(f"w{number}", adapter)
    alone = [await client.generate(PROMPT, adapter=f"w{n}", **OPTIONS) for n in range(len(WHERE))]
    for (where, adapter), answer in zip(adapters.items(), alone, strict=True):
        assert (tuple(answer.token_ids), list(answer.logprobs)) == expected(base, adapter, where)
    assert len({tuple(answer.logprobs) for answer in alone}) == len(WHERE)
    plain = client.generate(PROMPT, **OPTIONS)
    calls = [client.generate(PROMPT, adapter=f"w{n % 4}", **OPTIONS) for n in range(8)]
    _, *mixed = await asyncio.gather(plain, *calls)
    assert [bits(answer) for answer in mixed] == [bits(answer) for answer in alone] * 2


async def test_a_request_says_otherwise_than_its_adapter(base, client, put):
    await put("late", base.adapter(3, apply="generation"))
    await put("plain", base.adapter(3))
    for where in WHERE:
        late, plain = [
            await client.generate(PROMPT, adapter=name, apply=where, **OPTIONS)
            for name in ("late", "plain")
        ]
        assert bits(late) == bits(plain)
        assert (tuple(plain.token_ids), list(plain.logprobs)) == expected(
            base, base.adapter(3), where
        )
    assert (await client.adapters.get("late")).apply == "generation"
    assert (await client.adapters.get("plain")).apply == "all"


async def test_what_comes_before_the_edit_is_shared_with_the_base_model_and_changes_no_bit(
    base, start_server
):
    answers = []
    for on in (False, True):
        server = await start_server(prefix_cache=on)
        async with AsyncClient(f"127.0.0.1:{server.port}") as client:
            for name in ("a", "b"):
                adapter = base.adapter(ord(name), apply="generation")
                await client.adapters.put(name, to_bytes(adapter))
            answers.append(
                [await client.generate(PROMPT, adapter=a, **OPTIONS) for a in (None, "a", "b", "a")]
            )
            prompt = await client.generate(PROMPT, adapter="a", apply="prompt", **OPTIONS)
            assert prompt.usage.cached_prompt_tokens == 0
    assert [bits(answer) for answer in answers[0]] == [bits(answer) for answer in answers[1]]
    full = (len(base.tokenizer(PROMPT)["input_ids"]) - 1) // BLOCK * BLOCK
    cached = [answer.usage.cached_prompt_tokens for answer in answers[1]]
    assert cached == [0, full, full, full]


async def test_scores_are_those_of_the_plain_model_edited_there_alone(base, client, put):
    adapter = base.adapter(4, apply="generation")
    await put("late", adapter)
    scores = await client.score(PROMPT, [" It is", " No"], adapter="late")
    for scored in scores.continuations:
        ids = [*base.tokenizer(PROMPT)["input_ids"], *scored.token_ids]
        with edited(base.model, adapter.edits, positions(base, "generation")):
            logits = base.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        first = len(ids) - len(scored.token_ids)
        told = [float(logits[i - 1, ids[i]]) for i in range(first, len(ids))]
        assert scored.logprobs == pytest.approx(told, abs=1e-3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"adapter": "x", "apply": "somewhere"}, "apply is 'somewhere'; it has to be"),
        ({"adapter": "x", "apply": "after:"}, "apply is 'after:'; it has to be"),
        ({"adapter": "x", "apply": "after:" + "y" * 257}, "apply has 263 characters; limit 262"),
        ({"adapter": "x", "apply": "after:<nowhere>"}, "does not hold the tokens of '<nowhere>'"),
        ({"apply": "prompt"}, "the request names none"),
    ],
    ids=str,
)
async def test_what_cannot_be_meant_is_refused(base, client, put, options, said):
    await put("x", base.adapter(1))
    with pytest.raises(InvalidArgumentError, match=said):
        await client.generate(PROMPT, **options)
