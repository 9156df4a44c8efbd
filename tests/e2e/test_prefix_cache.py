"""Prompts that begin alike share their computed beginning, and no bit of an answer changes."""

import asyncio
import random

import numpy as np
import pytest
from conftest import save_tiny_model

from redmux import AsyncClient
from redmux_adapters import to_bytes
from redmux_server.models.kvcache import BLOCK

SYSTEM = "You are a ship's cook. Answer in one sentence and never mention the sea. "  # 72 tokens
QUESTIONS = ["What is for dinner?", "Who are you?", SYSTEM]
OPTIONS = {"max_tokens": 12, "ignore_eos": True, "logprobs": True}


def names(base, count=3):
    return {f"a{i}": base.adapter(i) for i in range(count)}


async def put_all(client, adapters):
    for name, adapter in adapters.items():
        await client.adapters.put(name, to_bytes(adapter), replace=True)


async def ask_all(client, work):
    return [await client.generate(SYSTEM + q, adapter=name, **OPTIONS) for q, name in work]


def bits(answers):
    return [(a.token_ids, a.logprobs, a.digest) for a in answers]


async def test_every_bit_is_the_same_cold_and_warm_alone_and_mixed(base, start_server):
    adapters = names(base)
    work = [(q, name) for q in QUESTIONS for name in (None, *adapters)]
    answers = []
    for on in (False, True):
        server = await start_server(max_running=8, max_batch_tokens=48, prefix_cache=on)
        async with AsyncClient(f"127.0.0.1:{server.port}") as client:
            await put_all(client, adapters)
            answers.append(await ask_all(client, work))
            answers.append(await ask_all(client, work))
            mixed = [client.generate(SYSTEM + q, adapter=n, **OPTIONS) for q, n in work]
            answers.append(await asyncio.gather(*mixed))
    assert all(bits(a) == bits(answers[0]) for a in answers)
    cached = [[a.usage.cached_prompt_tokens for a in some] for some in answers]
    assert cached[:3] == [[0] * len(work)] * 3
    # The first question of each adapter is cold; the last is the system prompt once more.
    assert cached[3] == [0] * 4 + [2 * BLOCK] * 8
    assert cached[4] == cached[5] == [2 * BLOCK] * 8 + [4 * BLOCK] * 4


async def test_bits_stay_the_same_while_the_cache_is_too_small_for_all(base, start_server):
    """Random conversations, some left early; blocks are evicted, shared and written all the time.

    A shared block is compared before and after every step: nobody may write to it.
    """
    adapters = names(base, 2)
    rng = random.Random(5)
    starts = [SYSTEM, SYSTEM[:40] + "?", "x" * 100, "A short one."]
    work = [(s + tail, name) for s in starts for tail in ("", " Why?", " no " * 9)
            for name in (None, *adapters)]  # fmt: skip
    plain = await start_server(max_running=4, max_batch_tokens=48, prefix_cache=False)
    async with AsyncClient(f"127.0.0.1:{plain.port}") as client:
        await put_all(client, adapters)
        alone = {job: await client.generate(job[0], adapter=job[1], **OPTIONS) for job in work}

    server = await start_server(
        max_running=4, max_batch_tokens=48, max_context=160, kv_cache_tokens=448
    )
    steps, changed = watch_shared_blocks(server)
    async with AsyncClient(f"127.0.0.1:{server.port}") as client:
        await put_all(client, adapters)

        async def talk():
            for _ in range(12):
                prompt, name = job = rng.choice(work)
                if rng.random() < 0.15:
                    stream = client.stream(prompt, adapter=name, max_tokens=20, ignore_eos=True)
                    async for _ in stream:
                        break
                    await stream.aclose()
                    continue
                got = await client.generate(prompt, adapter=name, **OPTIONS)
                assert bits([got]) == bits([alone[job]])

        await asyncio.gather(*(talk() for _ in range(6)))
        while server.engine.num_open:
            await asyncio.sleep(0)
    pool = server.engine._scheduler._blocks
    assert pool.num_free == pool.num_blocks
    assert not any(pool._num_users)
    assert server.engine._scheduler.num_cached_tokens > 20 * BLOCK
    assert not any(changed)
    assert max(steps) >= 8
    assert steps.count(0) < len(steps) / 4


def watch_shared_blocks(server):
    """Notes for each step how many shared blocks there are and whether it changes any."""
    index = server.engine._scheduler._blocks._index
    layers = server.model.runner.cache.paged
    forward = server.model.runner.forward
    counts, changed = [], []

    def watching(work):
        shared = sorted(index._keys)
        counts.append(len(shared))
        before = [(layer.keys[shared], layer.values[shared]) for layer in layers]
        logits = forward(work)
        for layer, (keys, values) in zip(layers, before, strict=True):
            changed.append(not np.array_equal(layer.keys[shared], keys))
            changed.append(not np.array_equal(layer.values[shared], values))
        return logits

    server.model.runner.forward = watching
    return counts, changed


async def test_the_next_turn_of_a_chat_finds_the_answer_before_it(client):
    ids = list(SYSTEM.encode())
    answer = await client.generate(ids, max_tokens=60, ignore_eos=True)
    ids += [*answer.token_ids, 5, 6, 7]
    warm = await client.generate(ids, **OPTIONS)
    assert warm.usage.prompt_tokens == len(ids)
    assert warm.usage.cached_prompt_tokens == (len(ids) - 4) // BLOCK * BLOCK == 4 * BLOCK


async def test_a_prompt_of_whole_blocks_computes_its_last_block_anew(client):
    ids = list(SYSTEM.encode())[: 2 * BLOCK]
    cold, warm = [await client.generate(ids, **OPTIONS) for _ in range(2)]
    assert warm.usage.cached_prompt_tokens == BLOCK
    assert bits([warm]) == bits([cold])


async def test_replaced_content_never_meets_the_blocks_of_the_old(base, client, put):
    versions = [base.adapter(1), base.adapter(2)]
    answers = []
    for version in (*versions, *versions):
        await put("x", version, replace=True)
        answers.append(await client.generate(SYSTEM, adapter="x", **OPTIONS))
    assert [a.usage.cached_prompt_tokens for a in answers] == [0, 0, 2 * BLOCK, 2 * BLOCK]
    assert bits(answers[2:]) == bits(answers[:2])
    assert answers[0].logprobs != answers[1].logprobs


async def test_an_adapter_is_found_by_its_name_and_by_its_digest(base, client, put):
    await put("x", base.adapter(1))
    await client.generate(SYSTEM, adapter="x", max_tokens=1)
    got = await client.generate(SYSTEM, adapter=base.adapter(1).digest, max_tokens=1)
    assert got.usage.cached_prompt_tokens == 2 * BLOCK


async def test_callers_with_other_keys_find_nothing(base, start_server):
    server = await start_server(api_keys=("one", "two"))
    cached = []
    for key in ("one", "two", "one", "two"):
        async with AsyncClient(f"127.0.0.1:{server.port}", api_key=key) as client:
            name = f"x-{key}"  # the same adapter: a name belongs to one key
            await client.adapters.put(name, to_bytes(base.adapter(1)))
            for adapter in (None, name):
                got = await client.generate(SYSTEM, adapter=adapter, max_tokens=1)
                cached.append(got.usage.cached_prompt_tokens)
    assert cached == [0] * 4 + [2 * BLOCK] * 4


@pytest.mark.parametrize("on", [True, False])
async def test_info_tells_whether_there_is_a_prefix_cache(on, start_server):
    server = await start_server(prefix_cache=on)
    async with AsyncClient(f"127.0.0.1:{server.port}") as client:
        (choice,) = [c for c in (await client.info()).choices if c.startswith("prefix cache")]
        assert choice.startswith(f"prefix cache: {'on' if on else 'off'}")
        answers = [await client.generate(SYSTEM, max_tokens=1) for _ in range(2)]
    assert answers[1].usage.cached_prompt_tokens == on * 2 * BLOCK


async def test_no_more_is_kept_than_fits_into_prefix_cache_bytes(start_server):
    server = await start_server(prefix_cache_bytes=1)  # less than a block
    async with AsyncClient(f"127.0.0.1:{server.port}") as client:
        choices = (await client.info()).choices
        answers = [await client.generate(SYSTEM, max_tokens=1) for _ in range(2)]
    assert any(c.startswith("prefix cache: on, keeps 0 tokens in blocks of 32") for c in choices)
    assert [a.usage.cached_prompt_tokens for a in answers] == [0, 0]


SMALL = {"vocab_size": 260, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
FAMILIES = {
    "gpt2": SMALL | {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gemma2": SMALL | {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "max_position_embeddings": 128, "sliding_window": 9, "attn_logit_softcapping": 5.0,
        "query_pre_attn_scalar": 16,
    },
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
async def test_a_family_s_bits_are_the_same_warm(family, start_server, tmp_path):
    """Learned positions, windows that are shorter than what is cached, and soft caps."""
    from transformers import AutoConfig

    folder = save_tiny_model(tmp_path, AutoConfig.for_model(family, **FAMILIES[family]))
    server = await start_server(model=str(folder), max_batch_tokens=64)
    assert (await server.info()).bit_identical
    async with AsyncClient(f"127.0.0.1:{server.port}") as client:
        cold, warm = [await client.generate(SYSTEM, **OPTIONS) for _ in range(2)]
    assert warm.usage.cached_prompt_tokens == 2 * BLOCK
    assert bits([warm]) == bits([cold])


async def test_a_back_end_whose_bits_depend_on_the_chunks_gives_the_same_but_for_rounding(
    start_server,
):
    server = await start_server(dtype="bfloat16")
    async with AsyncClient(f"127.0.0.1:{server.port}") as client:
        options = OPTIONS | {"max_tokens": 1}
        cold, warm = [await client.generate(SYSTEM, **options) for _ in range(2)]
    assert warm.usage.cached_prompt_tokens == 2 * BLOCK
    assert warm.logprobs == pytest.approx(cold.logprobs, abs=0.05)
