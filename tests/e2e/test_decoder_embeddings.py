"""Vectors of decoders: the last hidden states of plain transformers, pooled by hand."""

import asyncio

import pytest
import torch
from conftest import load_reference, save_tiny_model
from reference import edited

from redmux import AsyncClient, FailedPreconditionError, InvalidArgumentError
from redmux_adapters import to_bytes

TEXTS = ["x", "A somewhat longer text, cut into several chunks of a step's budget. " * 2]


@torch.inference_mode()
def vector(base, text, adapter, pooling):
    ids = base.tokenizer(text)["input_ids"]
    with edited(base.model, adapter.edits if adapter else {}):
        states = base.model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0]
    return {"cls": states[0], "mean": states.mean(0)}.get(pooling, states[-1])


async def check(base, client):
    """Vectors equal the reference, and have the same bits alone and among generations."""
    adapters = {"one": base.adapter(1), "two": base.adapter(2)}
    for name, adapter in adapters.items():
        await client.adapters.put(name, to_bytes(adapter))
    work = [(name, pooling) for name in (None, *adapters) for pooling in ("mean", "cls", None)]
    alone = [await client.embed(TEXTS, adapter=name, pooling=pooling) for name, pooling in work]
    tokens = await client.generate(TEXTS[1], max_tokens=8, adapter="one", ignore_eos=True)
    given = [" and more", "!"]
    scores = await client.score(TEXTS[1], given, adapter="one", prompt_logprobs=True)
    *mixed, among, scored = await asyncio.gather(
        *(client.embed(TEXTS, adapter=name, pooling=pooling) for name, pooling in work),
        client.generate(TEXTS[1], max_tokens=8, adapter="one", ignore_eos=True),
        client.score(TEXTS[1], given, adapter="one", prompt_logprobs=True),
    )
    assert mixed == alone  # exactly
    assert among == tokens
    assert (scored.continuations, scored.prompt) == (scores.continuations, scores.prompt)
    for (name, pooling), got in zip(work, alone, strict=True):
        assert got.digest == (name and adapters[name].digest)
        for text, have in zip(TEXTS, got.vectors, strict=True):
            wanted = vector(base, text, name and adapters[name], pooling)
            torch.testing.assert_close(torch.tensor(have), wanted, atol=5e-4, rtol=1e-4)


async def test_a_fused_decoder_embeds_as_transformers_does(base, start_server):
    server = await start_server(max_running=8, max_batch_tokens=24, threads=1)
    async with AsyncClient(f"127.0.0.1:{server.port}") as client:
        await check(base, client)


async def test_a_decoder_with_hooks_embeds_as_transformers_does(start_server, tmp_path):
    from transformers import GPT2Config

    config = GPT2Config(
        vocab_size=260, n_embd=64, n_layer=2, n_head=4, n_positions=256,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    folder = save_tiny_model(tmp_path, config)
    server = await start_server(model=str(folder), max_running=8, max_batch_tokens=24, threads=1)
    async with AsyncClient(f"127.0.0.1:{server.port}") as client:
        await check(load_reference(folder), client)


async def test_a_prompt_in_the_prefix_cache_does_not_shorten_an_embedding(base, start_server):
    server = await start_server(threads=1)
    async with AsyncClient(f"127.0.0.1:{server.port}") as client:
        cold = await client.embed([TEXTS[1]], pooling="mean")
        await client.generate(TEXTS[1], max_tokens=2)
        again = await client.generate(TEXTS[1], max_tokens=2)
        assert again.usage.cached_prompt_tokens > 0
        assert await client.embed([TEXTS[1]], pooling="mean") == cold


async def test_a_decoder_refuses_to_classify_and_to_take_pairs(base, start_server):
    server = await start_server(threads=1)
    async with AsyncClient(f"127.0.0.1:{server.port}") as client:
        assert (await client.info()).kind == "decoder"
        with pytest.raises(FailedPreconditionError, match=r"decoder \(LlamaForCausalLM\)"):
            await client.classify(["x"], adapter="any")
        with pytest.raises(InvalidArgumentError, match="pairs of texts are for encoders"):
            await client.embed([("a", "b")])
