"""T5, mT5 and Flan-like models against plain transformers with the edits by hand."""

import asyncio

import pytest
import torch
from conftest import save_tiny_model
from reference import edited

import redmux
from redmux_adapters import (
    Adapter,
    Edit,
    editable_sites,
    ffn_sites,
    fingerprint,
    load_seq2seq_base,
    red_sites,
    to_bytes,
    with_layer_norms,
)

# Of the largest logit: transformers itself moves by half as much between instruction sets.
TOLERANCE = 2e-5
SOURCES = ["x", "translate: hello there", "a longer source, past one block of the cache", "1 2"]
SIZES = {
    "vocab_size": 260, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 4,
    "num_decoder_layers": 3, "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20, "decoder_start_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 0,
}  # fmt: skip


def config(kind):
    from transformers import MT5Config, T5Config

    if kind == "mt5":
        return MT5Config(**SIZES, architectures=["MT5ForConditionalGeneration"])
    gated = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    return T5Config(
        **SIZES, **(gated if kind == "flan" else {}),
        architectures=["T5ForConditionalGeneration"],
    )  # fmt: skip


@pytest.fixture(params=["t5", "mt5", "flan"])
def folder(request, tmp_path):
    from transformers import AutoModelForSeq2SeqLM

    return save_tiny_model(tmp_path, config(request.param), kind=AutoModelForSeq2SeqLM)


def random_adapter(model, seed, sites):
    generator = torch.Generator().manual_seed(seed)
    edits = {
        path: Edit(
            1 + 0.4 * torch.randn(dim, generator=generator),
            0.3 * torch.randn(dim, generator=generator),
        )
        for path, dim in sites.items()
    }
    return Adapter(base_fingerprint=fingerprint(model), edits=edits)


@torch.inference_mode()
def reference(model, source_ids, num_tokens, edits):
    ids, logprobs, largest = [0], [], 0.0
    with edited(model, edits):
        for _ in range(num_tokens):
            row = model(
                input_ids=torch.tensor([source_ids]), decoder_input_ids=torch.tensor([ids]),
                use_cache=False,
            ).logits[0, -1]  # fmt: skip
            ids.append(int(row.argmax()))
            logprobs.append(float(row.log_softmax(-1)[ids[-1]]))
            largest = max(largest, float(row.abs().max()))
    return ids[1:], logprobs, largest


async def test_every_mix_gives_what_transformers_gives_and_the_same_bits(folder, start_server):
    model, tokenizer = load_seq2seq_base(str(folder))
    sites = {
        "ffn": ffn_sites(model),
        "all": editable_sites(model),
        "ln": with_layer_norms(red_sites(model, "res_with_attn")),
    }
    adapters = {
        name: random_adapter(model, seed, chosen)
        for seed, (name, chosen) in enumerate(sites.items(), 1)
    }
    jobs = [(source, name) for source in SOURCES for name in (None, *adapters)]
    server = await start_server(model=str(folder), max_running=8, max_batch_tokens=8)
    assert (await server.info()).bit_identical
    async with redmux.AsyncClient(f"127.0.0.1:{server.port}") as client:
        for name, adapter in adapters.items():
            await client.adapters.put(name, to_bytes(adapter))

        def ask(job, **options):
            values = {"max_tokens": 8, "ignore_eos": True, "logprobs": True} | options
            return client.generate(job[0], adapter=job[1], **values)

        alone = [await ask(job) for job in jobs]
        for (source, name), got in zip(jobs, alone, strict=True):
            ids = tokenizer(source)["input_ids"]
            tokens, logprobs, largest = reference(
                model, ids, 8, adapters[name].edits if name else {}
            )
            assert list(got.token_ids) == tokens
            assert got.logprobs == pytest.approx(logprobs, abs=TOLERANCE * largest)
            assert got.usage.prompt_tokens == len(ids)
        assert await asyncio.gather(*map(ask, jobs)) == alone
        assert await asyncio.gather(*map(ask, jobs[::-1])) == alone[::-1]

        # Joins a batch that runs, and one that loses a member half-way.
        stream = client.stream(SOURCES[2], adapter="all", max_tokens=40, ignore_eos=True)
        await anext(stream)
        joined = asyncio.gather(*map(ask, jobs))
        await stream.aclose()
        assert await joined == alone

        drawn = {"temperature": 1.5, "seed": 4, "top_p": 0.9}
        one = await ask(jobs[1], **drawn)
        among, *_ = await asyncio.gather(ask(jobs[1], **drawn), *map(ask, jobs))
        assert among == one
        with pytest.raises(redmux.InvalidArgumentError, match="encoder of the model reads the pr"):
            await client.score("a", ["b"], prompt_logprobs=True)
        with pytest.raises(redmux.UnimplementedError, match="cannot embed"):
            await client.embed(["a"])
        assert (await client.info()).kind == "encoder_decoder"
        with pytest.raises(redmux.InvalidArgumentError, match="must be at most"):
            await client.generate("x" * 1020, max_tokens=5)
    assert server.model.bank.num_uses == 0


@torch.inference_mode()
def scores_by_hand(model, source_ids, target_ids, edits):
    """(log-probabilities, is the likeliest) of the tokens of a target, and the largest logit."""
    with edited(model, edits):
        logits = model(
            input_ids=torch.tensor([source_ids]), decoder_input_ids=torch.tensor([[0, *target_ids]])
        ).logits[0, :-1]
    targets = torch.tensor(target_ids)
    logprobs = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    return logprobs.tolist(), (logits.argmax(-1) == targets).tolist(), float(logits.abs().max())


def record_counts(runner, counts):
    """Adds how many tokens of the decoder each request has in a step."""
    forward = runner.forward

    def record(work):
        counts.update(item.count for item in work)
        return forward(work)

    runner.forward = record


async def test_continuations_are_scored_by_the_decoder_whatever_the_cutting(folder, start_server):
    model, tokenizer = load_seq2seq_base(str(folder))
    adapter = random_adapter(model, 1, editable_sites(model))
    targets, found, counts = ["yes", "a longer answer, cut into steps", "x"], [], set()
    for options in ({"max_running": 4, "max_batch_tokens": 4, "max_context": 40}, {}):
        server = await start_server(model=str(folder), **options)
        record_counts(server.model.runner, counts if options else set())
        async with redmux.AsyncClient(f"127.0.0.1:{server.port}") as client:
            await client.adapters.put("a", to_bytes(adapter))
            for name in (None, "a"):
                both = [client.score(SOURCES[0], targets, adapter=name) for _ in range(2)]
                one, other = await asyncio.gather(*both)
                assert one == other
                found.append(one)
            made = await client.generate(SOURCES[0], max_tokens=6, logprobs=True, ignore_eos=True)
            (again,) = (await client.score(SOURCES[0], [made.token_ids])).continuations
            assert again.logprobs == made.logprobs
            assert again.all_greedy
    assert found[:2] == found[2:]  # exactly
    assert counts & set(range(4, len(targets[1])))  # it was cut
    source_ids = tokenizer(SOURCES[0])["input_ids"]
    for scores, edits in zip(found, ({}, adapter.edits), strict=False):
        assert scores.usage.prompt_tokens == len(source_ids)
        for text, got in zip(targets, scores.continuations, strict=True):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            logprobs, greedy, largest = scores_by_hand(model, source_ids, ids, edits)
            assert list(got.token_ids) == ids
            assert got.logprobs == pytest.approx(logprobs, abs=TOLERANCE * largest)
            assert list(got.is_greedy) == greedy
