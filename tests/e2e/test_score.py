"""Log-probabilities of given tokens against plain transformers with the edit by hand."""

import asyncio

import pytest
import torch
from reference import edited

import redmux
from redmux_adapters import to_bytes
from redmux_server.models.kvcache import BLOCK

PROMPT = "A prompt that is longer than one block of the cache and than a step."
CONTINUATIONS = [" yes", " no", " something longer than a step's budget of tokens, by far.", "x"]


@torch.inference_mode()
def expected(base, ids, edits):
    """(logprobs, greedy) of every token but the first."""
    with edited(base.model, edits or {}):
        logits = base.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]
    wanted = torch.tensor(ids[1:])
    logprobs = torch.log_softmax(logits, -1).gather(1, wanted[:, None])[:, 0]
    return logprobs.tolist(), (logits.argmax(-1) == wanted).tolist()


def check(base, scores, adapter, prompt=PROMPT, continuations=CONTINUATIONS):
    start = base.tokenizer(prompt)["input_ids"]
    for got, text in zip(scores.continuations, continuations, strict=True):
        ids = base.tokenizer(prompt + text)["input_ids"]
        logprobs, greedy = expected(base, ids, adapter and adapter.edits)
        n = len(start) - 1
        assert list(got.token_ids) == ids[len(start) :]
        assert got.logprobs == pytest.approx(logprobs[n:], abs=2e-4)
        assert list(got.is_greedy) == greedy[n:]
        assert got.logprob == pytest.approx(sum(logprobs[n:]), abs=2e-3)
        if scores.prompt is not None:
            assert list(scores.prompt.token_ids) == start[1:]
            assert scores.prompt.logprobs == pytest.approx(logprobs[:n], abs=2e-4)
            assert list(scores.prompt.is_greedy) == greedy[:n]


async def test_scores_equal_the_reference_with_any_adapter(base, client, put):
    for adapter in (None, base.adapter(1)):
        if adapter is not None:
            await put("a", adapter)
        scores = await client.score(
            PROMPT, CONTINUATIONS, adapter=adapter and "a", prompt_logprobs=True
        )
        check(base, scores, adapter)
        assert scores.digest == (adapter and adapter.digest)


async def test_bits_are_the_same_alone_and_beside_generations(base, server, client, put):
    assert (await server.info()).bit_identical
    adapters = {f"a{i}": base.adapter(i) for i in range(3)}
    for name, adapter in adapters.items():
        await put(name, adapter)
    names = [None, *adapters]

    def score(name, texts=CONTINUATIONS):
        return client.score(PROMPT, texts, adapter=name, prompt_logprobs=True)

    alone = [await score(name) for name in names]
    crowd = [client.generate("Once " * i, adapter=names[i % 4], max_tokens=20) for i in range(1, 7)]
    mixed = await asyncio.gather(*(score(name) for name in names), *crowd)
    assert mixed[: len(names)] == alone
    backwards = await asyncio.gather(*(score(n, CONTINUATIONS[::-1]) for n in names[::-1]))
    for one, other in zip(alone, backwards[::-1], strict=True):
        assert other.continuations == one.continuations[::-1]
        assert other.prompt == one.prompt


async def test_neither_budget_nor_prefix_cache_moves_a_bit(base, start_server):
    found = []
    for options in ({"max_batch_tokens": 3}, {"max_batch_tokens": 256}, {"prefix_cache": False}):
        server = await start_server(max_running=3, **options)
        async with redmux.AsyncClient(f"127.0.0.1:{server.port}") as client:
            await client.adapters.put("a", to_bytes(base.adapter(1)))
            for _ in range(2):
                found.append(await client.score(PROMPT, CONTINUATIONS, adapter="a"))
    assert all(f == found[0] for f in found)
    assert found[1].usage.cached_prompt_tokens == found[3].usage.cached_prompt_tokens == 2 * BLOCK
    assert found[5].usage.cached_prompt_tokens == 0


async def test_what_is_generated_greedily_is_scored_as_generated(client):
    made = await client.generate(PROMPT, max_tokens=9, logprobs=True, ignore_eos=True)
    scores = await client.score(PROMPT, [made.token_ids])
    assert scores.continuations[0].logprobs == made.logprobs
    assert scores.continuations[0].all_greedy
    assert (scores.usage.prompt_tokens, scores.usage.completion_tokens) == (len(PROMPT), 9)


async def test_a_scored_prompt_needs_no_continuation(base, client):
    scores = await client.score("abc", prompt_logprobs=True)
    logprobs, _ = expected(base, base.tokenizer("abc")["input_ids"], None)
    assert scores.prompt.logprobs == pytest.approx(logprobs, abs=2e-4)
    assert scores.continuations == ()


async def test_the_prompt_is_scored_even_where_it_was_cached(base, client):
    cold = await client.score(PROMPT, [" yes"], prompt_logprobs=True)
    warm = await client.score(PROMPT, [" yes"], prompt_logprobs=True)
    assert warm == cold
    assert len(warm.prompt.logprobs) == len(PROMPT) - 1


async def test_many_continuations_wait_for_their_turn_and_leave_room_for_others(base, start_server):
    server = await start_server(max_running=2, max_queue=2)
    texts = [f" {i}" for i in range(40)]
    most_open, submit = 0, server.engine.submit

    def count(*requests):
        nonlocal most_open
        submit(*requests)
        most_open = max(most_open, server.engine.num_open)

    server.engine.submit = count
    async with redmux.AsyncClient(f"127.0.0.1:{server.port}") as client:
        one_by_one = [await client.score(PROMPT, [text]) for text in texts]
        scores, *_ = await asyncio.gather(
            client.score(PROMPT, texts), *(client.generate("a", max_tokens=9) for _ in range(2))
        )
        assert most_open <= 4
        many = await asyncio.gather(*(client.score(PROMPT, texts) for _ in range(2)))
    assert list(scores.continuations) == [one.continuations[0] for one in one_by_one]
    assert [m.continuations for m in many] == [scores.continuations] * 2


async def test_a_continuation_that_fails_fails_the_call_with_its_own_error(
    server, client, monkeypatch
):
    """The second of three; the third is given up."""
    runner = server.model.runner
    forward = runner.forward

    def spoil(work):
        logits = forward(work)
        if any(item.request.token_ids[-1] == 3 for item in work):
            return logits * float("nan")
        return logits

    monkeypatch.setattr(runner, "forward", spoil)
    with pytest.raises(redmux.FailedPreconditionError, match="value that is not finite"):
        await client.score("ab", [[1, 2], [3, 4], [5, 6]])
    while server.engine.num_open:
        await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("prompt", "continuations", "message"),
    [
        ("ab", [], "nothing to score"),
        ("ab", ["x", ""], r"continuations\[1\] is empty"),
        ("ab", [[1, 999]], "999 is outside"),
        ("a" * 200, ["b" * 57], "together they must be at most 256"),
        ("a", ["b"] * 129, "129 continuations; limit 128"),
        ([], ["b"], "the prompt is empty"),
    ],
)
async def test_what_cannot_be_scored_is_refused(client, server, prompt, continuations, message):
    with pytest.raises(redmux.InvalidArgumentError, match=message):
        await client.score(prompt, continuations)
    assert server.engine.num_open == 0


async def test_a_cancelled_scoring_gives_everything_back(server, client):
    task = asyncio.create_task(client.score(PROMPT, [" yes" * 40] * 20))
    while not server.engine.num_open:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await client.score("a", ["b"])
    while server.engine.num_open:
        await asyncio.sleep(0)
    assert server.model.bank.num_uses == 0
