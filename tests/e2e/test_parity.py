"""Served tokens and log-probabilities against plain transformers with the edit by hand."""

import asyncio
import random

import pytest
from reference import generate

from redmux_server.models.kvcache import BLOCK

PROMPTS = ["x", "Hello there", "A somewhat longer prompt, past one block of the cache.", "1 2 3 4"]


def jobs(base, num_adapters=3):
    adapters = [None, *(base.adapter(seed) for seed in range(num_adapters))]
    return [(prompt, adapter) for prompt in PROMPTS for adapter in adapters]


async def publish(put, adapters):
    for adapter in {a.digest: a for a in adapters if a is not None}.values():
        await put(adapter.digest[7:23], adapter)


async def ask(client, prompt, adapter, **options):
    options = {"max_tokens": 12, "ignore_eos": True, "logprobs": True} | options
    name = adapter and adapter.digest[7:23]
    return await client.generate(prompt, adapter=name, **options)


async def test_tokens_and_logprobs_equal_the_reference_alone_and_mixed(base, client, put):
    work = jobs(base)
    await publish(put, [a for _, a in work])
    alone = [await ask(client, p, a) for p, a in work]
    mixed = await asyncio.gather(*(ask(client, p, a) for p, a in work))
    for (prompt, adapter), one, other in zip(work, alone, mixed, strict=True):
        ids = base.tokenizer(prompt)["input_ids"]
        tokens, logprobs = generate(base.model, ids, 12, adapter and adapter.edits)
        assert list(one.token_ids) == tokens
        assert list(other.token_ids) == tokens
        assert one.logprobs == pytest.approx(logprobs, abs=2e-4)
        assert one.digest == other.digest == (adapter and adapter.digest)


async def test_bits_are_the_same_in_any_trace_of_requests(base, server, client, put):
    """Random arrivals, orders, lengths, cancellations: every log-probability has the same bits."""
    assert (await server.info()).bit_identical
    rng = random.Random(3)
    work = jobs(base)
    await publish(put, [a for _, a in work])
    alone = {i: await ask(client, p, a) for i, (p, a) in enumerate(work)}

    async def later(index):
        for _ in range(rng.randrange(6)):
            await asyncio.sleep(0)
        prompt, adapter = work[index]
        if rng.random() < 0.2:
            stream = client.stream(
                prompt, adapter=adapter and adapter.digest, max_tokens=30, ignore_eos=True
            )
            async for _ in stream:
                break
            await stream.aclose()
            return
        count = rng.randrange(1, 13)
        got = await ask(client, prompt, adapter, max_tokens=count)
        assert got.token_ids == alone[index].token_ids[:count]
        assert got.logprobs == alone[index].logprobs[:count]  # exactly, not approximately

    for _ in range(4):
        order = [rng.randrange(len(work)) for _ in range(24)]
        await asyncio.gather(*(later(i) for i in order))


async def test_bits_do_not_depend_on_how_the_prefill_was_cut(base, start_server):
    from redmux import AsyncClient
    from redmux_adapters import to_bytes

    adapter = base.adapter(5)
    answers = []
    for budget in (4, 7, BLOCK, 256):
        server = await start_server(max_running=2, max_batch_tokens=budget)
        async with AsyncClient(f"127.0.0.1:{server.port}") as client:
            await client.adapters.put(adapter.digest[7:23], to_bytes(adapter))
            answers.append(await ask(client, PROMPTS[2], adapter))
    assert all(a == answers[0] for a in answers)


async def test_a_seeded_draw_is_the_same_alone_and_in_a_crowd(base, client, put):
    adapter = base.adapter(1)
    await publish(put, [a for _, a in jobs(base)])
    options = {"temperature": 1.5, "seed": 11, "top_p": 0.9}
    alone = await ask(client, "Once", adapter, **options)
    crowd = [ask(client, p, a, temperature=1.0) for p, a in jobs(base)]
    among, *_ = await asyncio.gather(ask(client, "Once", adapter, **options), *crowd)
    other = await ask(client, "Once", adapter, **options | {"seed": 12})
    assert among == alone
    assert other.token_ids != alone.token_ids


async def test_chat_is_rendered_in_the_format_of_the_adapter_or_of_the_model(base, client, put):
    from redmux_adapters import PromptFormat, Turn

    adapter = base.adapter(2, prompt_format=PromptFormat(Turn("Q: ", "\n"), Turn("A:", "\n")))
    await publish(put, [adapter])
    messages = [{"role": "user", "content": "why"}]
    assert await ask(client, messages, adapter) == await ask(client, "Q: why\nA:", adapter)
    of_model = await ask(client, messages, None)
    assert of_model == await ask(client, "[user]why[assistant]", None)
