"""Two tenants on one real server: a flood of one holds up the other no more than it has to."""

import asyncio

import pytest
from conftest import save_tiny_model
from e2e.test_encoder_decoder import config as t5_config

from redmux import AsyncClient, ResourceExhaustedError
from redmux_adapters import to_bytes

FLOOD = {"max_tokens": 200, "ignore_eos": True, "logprobs": True}


@pytest.fixture
async def clients(start_server):
    server = await start_server(
        max_running=2, max_batch_tokens=8, max_queue=6, api_keys=("key-of-alice", "key-of-bob")
    )
    target = f"127.0.0.1:{server.port}"
    async with (
        AsyncClient(target, api_key="key-of-alice") as alice,
        AsyncClient(target, api_key="key-of-bob") as bob,
    ):
        yield server, alice, bob


async def test_a_key_cannot_fill_the_queue_for_another(clients):
    server, alice, bob = clients
    flood = [asyncio.create_task(alice.generate("abc", **FLOOD)) for _ in range(12)]
    while server.engine.num_open < 7:
        await asyncio.sleep(0)
    await bob.generate("abc", max_tokens=4)
    assert server.engine.num_open >= 5  # the flood goes on
    results = await asyncio.gather(*flood, return_exceptions=True)
    refused = [r for r in results if isinstance(r, Exception)]
    assert len(refused) == 5
    for error in refused:
        assert isinstance(error, ResourceExhaustedError)
        assert "share of this API key" in str(error)


async def test_what_lost_its_row_to_another_tenant_has_the_same_bits(clients, base):
    server, alice, bob = clients
    await alice.adapters.put("x", to_bytes(base.adapter(1)))
    alone = await alice.generate("abc", adapter="x", temperature=0.7, seed=3, **FLOOD)
    flood = [
        asyncio.create_task(alice.generate("abc", adapter="x", temperature=0.7, seed=3, **FLOOD))
        for _ in range(4)
    ]
    for _ in range(4):
        await bob.generate("hello", max_tokens=2, ignore_eos=True)
    assert server.metrics.registry.get_sample_value("redmux_requests_sent_back_total") >= 1
    for result in await asyncio.gather(*flood):
        assert (result.token_ids, result.logprobs) == (alone.token_ids, alone.logprobs)


async def test_answers_that_outgrow_the_cache_have_the_same_bits_and_all_end(start_server, base):
    """Nobody sets max_tokens, so every answer goes on to the end of the context."""
    options = {"ignore_eos": True, "logprobs": True, "temperature": 0.7, "timeout_s": 300}
    work = [(prompt, name, seed) for seed, prompt in enumerate(["abc", "x" * 40, "hello"])
            for name in (None, "x", "y")]  # fmt: skip
    answers = []
    for tokens in (9 * 160, 448):  # the whole of each of them, or not even three
        server = await start_server(
            max_running=9, max_batch_tokens=48, max_context=160, kv_cache_tokens=tokens
        )
        async with AsyncClient(f"127.0.0.1:{server.port}") as client:
            for seed, name in enumerate("xy"):
                await client.adapters.put(name, to_bytes(base.adapter(seed)))
            asked = [client.generate(p, adapter=n, seed=s, **options) for p, n, s in work]
            results = await asyncio.gather(*asked)
        answers.append([(r.token_ids, r.logprobs) for r in results])
        sent_back = server.metrics.registry.get_sample_value("redmux_requests_sent_back_total")
        assert (sent_back > 0) == (tokens < 9 * 160)
        assert server.engine.kv_used_ratio == 0
    assert answers[0] == answers[1]
    assert [len(ids) for ids, _ in answers[1]] == [160 - len(p) for p, _, _ in work]


async def test_an_encoder_decoder_encodes_anew_what_lost_its_row(start_server, tmp_path):
    from transformers import AutoModelForSeq2SeqLM

    folder = save_tiny_model(tmp_path, t5_config("t5"), kind=AutoModelForSeq2SeqLM)
    server = await start_server(
        model=str(folder), max_running=2, max_batch_tokens=8, max_context=64,
        api_keys=("key-of-alice", "key-of-bob"),
    )  # fmt: skip
    short = FLOOD | {"max_tokens": 50, "timeout_s": 300}
    target = f"127.0.0.1:{server.port}"
    async with (
        AsyncClient(target, api_key="key-of-alice") as alice,
        AsyncClient(target, api_key="key-of-bob") as bob,
    ):
        alone = await alice.generate("a source", **short)
        flood = [asyncio.create_task(alice.generate("a source", **short)) for _ in range(24)]
        for _ in range(4):
            await bob.generate("hello", max_tokens=2, ignore_eos=True, timeout_s=300)
        results = await asyncio.gather(*flood)
    assert server.metrics.registry.get_sample_value("redmux_requests_sent_back_total") >= 1
    for result in results:
        assert (result.token_ids, result.logprobs) == (alone.token_ids, alone.logprobs)
