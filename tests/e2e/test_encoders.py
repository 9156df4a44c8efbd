"""Encoders: vectors and classifications against plain transformers, alone and in mixed batches."""

import asyncio
import dataclasses
import random

import pytest
import torch
from encoders import CONFIGS, HEAD_OF, PAD, Encoder, load_tiny_encoder, save_tiny_encoder

from redmux import AsyncClient
from redmux_adapters import red_sites, to_bytes, with_layer_norms

TEXTS = ["x", "Hello there", "A somewhat longer text of some sixty tokens, to have one of these"]
PAIR = ("Who wrote it?", "It was written by nobody.")
SCORES = {
    "single_label": lambda logits: torch.tensor(logits).softmax(0).tolist(),
    "multi_label": lambda logits: torch.tensor(logits).sigmoid().tolist(),
    "regression": lambda logits: logits,
}


@pytest.fixture(scope="session", params=CONFIGS)
def encoder(request, tmp_path_factory) -> Encoder:
    folder = save_tiny_encoder(tmp_path_factory.mktemp(request.param), request.param)
    return load_tiny_encoder(folder)


@pytest.fixture
async def server(start_server, encoder):
    return await start_server(
        model=str(encoder.folder), max_running=16, max_batch_tokens=48, max_queue=64, threads=1
    )


def with_heads(encoder):
    """Adapters with heads of this model's own kind and others, sizes and problem types."""
    own = HEAD_OF[encoder.model.config.model_type]
    adapters = [
        encoder.adapter(1, own),
        encoder.adapter(2, own, labels=["a", "b", "c"]),
        encoder.adapter(3, own, problem_type="multi_label_classification"),
        encoder.adapter(4, "mean", problem_type="regression", labels=["score"]),
    ]
    return {f"a{i}": adapter for i, adapter in enumerate(adapters)}


async def publish(client, adapters):
    for name, adapter in adapters.items():
        await client.adapters.put(name, to_bytes(adapter))


def ids_of(encoder, item):
    """(token ids, type ids) of an input, as the model's tokenizer has them."""
    if isinstance(item, list):
        return item, None
    pair = item if isinstance(item, tuple) else (item,)
    encoded = encoder.tokenizer(*pair)
    has_types = getattr(encoder.model.config, "type_vocab_size", 1) > 1 and len(pair) == 2
    return encoded["input_ids"], encoded["token_type_ids"] if has_types else None


async def test_logits_and_scores_equal_transformers_and_have_the_same_bits_alone_and_mixed(
    encoder, server, client
):
    adapters = with_heads(encoder)
    await publish(client, adapters)
    inputs = [*TEXTS, PAIR, [0, 9, PAD, 17, 2], list(range(3, 130 - 2))]
    work = [(name, item) for name in adapters for item in inputs]
    alone = [await client.classify([item], adapter=name) for name, item in work]
    mixed = await asyncio.gather(*(client.classify(inputs, adapter=name) for name in adapters))
    assert (await server.info()).bit_identical
    for (name, item), got in zip(work, alone, strict=True):
        ids, types = ids_of(encoder, item)
        wanted = encoder.logits(ids, adapters[name], types)
        (result,) = got.results
        assert result.logits == pytest.approx(wanted, abs=2e-4)
        assert result.scores == pytest.approx(SCORES[got.problem_type](result.logits), abs=1e-6)
        config = adapters[name].head.config
        assert got.labels == result.labels == config.labels
        assert config.problem_type.startswith(got.problem_type)
        assert got.usage.prompt_tokens == len(ids)
        assert (got.adapter, got.digest) == (name, adapters[name].digest)
    flat = [result for answer in mixed for result in answer.results]
    assert [one.results[0] for one in alone] == flat  # exactly


async def test_sums_with_the_residual_and_layer_norms_behind_edits_are_served(
    encoder, server, client
):
    own = HEAD_OF[encoder.model.config.model_type]
    sites = {
        "res": red_sites(encoder.model, "res"),
        "sums": red_sites(encoder.model, "res_with_attn"),
        "ln": with_layer_norms(red_sites(encoder.model, "more")),
        "all": with_layer_norms(red_sites(encoder.model, "res_with_attn")),
    }
    adapters = {
        name: dataclasses.replace(encoder, ffn=chosen).adapter(seed, own)
        for seed, (name, chosen) in enumerate(sites.items())
    }
    adapters["ffn"] = encoder.adapter(9, own)
    await publish(client, adapters)
    alone = [await client.classify([text], adapter=name) for name in adapters for text in TEXTS]
    mixed = await asyncio.gather(*(client.classify(TEXTS, adapter=name) for name in adapters))
    assert [one.results[0] for one in alone] == [r for answer in mixed for r in answer.results]
    work = [(adapter, text) for adapter in adapters.values() for text in TEXTS]
    for (adapter, text), got in zip(work, alone, strict=True):
        wanted = encoder.logits(ids_of(encoder, text)[0], adapter)
        assert got.results[0].logits == pytest.approx(wanted, abs=2e-4)


async def test_vectors_equal_transformers_and_have_the_same_bits_alone_and_mixed(encoder, client):
    adapters = {"one": encoder.adapter(1), "two": encoder.adapter(2, "mean")}
    await publish(client, adapters)
    rng = random.Random(0)
    work = [
        (item, name, pooling, normalize)
        for item in (*TEXTS[1:], PAIR, [5])
        for name in (None, *adapters)
        for pooling, normalize in (("mean", False), ("cls", True), ("last", False), (None, True))
    ]
    alone = [await embed(client, *call) for call in work]
    order = rng.sample(range(len(work)), 24)
    mixed = await asyncio.gather(*(embed(client, *work[i]) for i in order))
    assert mixed == [alone[i] for i in order]  # exactly
    for (item, name, pooling, normalize), got in zip(work, alone, strict=True):
        ids, types = ids_of(encoder, item)
        states = encoder.states(ids, name and adapters[name], types)
        wanted = {"cls": states[0], "last": states[-1]}.get(pooling, states.mean(0))
        if normalize:
            wanted = wanted / wanted.norm()
        torch.testing.assert_close(torch.tensor(got), wanted, atol=2e-4, rtol=1e-4)


async def embed(client: AsyncClient, item, name, pooling, normalize):
    got = await client.embed([item], adapter=name, pooling=pooling, normalize=normalize)
    assert got.adapter == name
    return got.vectors[0]
