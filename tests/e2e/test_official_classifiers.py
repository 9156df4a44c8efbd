"""The classifiers that the authors of RED published, on RoBERTa-base's shape, through a server."""

import asyncio

import pytest
import torch
from encoders import CONFIGS, load_tiny_encoder, save_tiny_encoder
from official import official

from redmux import AsyncClient
from redmux_adapters import Adapter, Edit, Head, HeadConfig, to_bytes

NAMES = ("roberta-base-qnli", "roberta-base-qnli-redpp")
PAIRS = [("Who wrote it?", "It was written in 1841."), ("Where?", "In Rome, as far as is known.")]


def read_adapter(name, fingerprint):
    vectors = torch.load(official(name), map_location="cpu", weights_only=True)
    sites = {key.partition(".delta_vector.")[0] for key in vectors}
    edits = {
        site: Edit(
            vectors[f"{site}.delta_vector.activation_scaling"][0].float(),
            vectors[f"{site}.delta_vector.activation_bias"][0].float(),
        )
        for site in sites
    }
    tensors = torch.load(official(name, "classifier.pth"), map_location="cpu", weights_only=True)
    config = HeadConfig("roberta", ["yes", "no"], "single_label_classification")
    return Adapter(fingerprint, edits, head=Head(config, dict(tensors)))


@pytest.mark.slow
async def test_logits_of_the_authors_classifiers_equal_transformers(
    start_server, tmp_path, monkeypatch
):
    """Random weights: theirs are not at hand, and no matter for equality."""
    shape = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1,
             "layer_norm_eps": 1e-5}  # fmt: skip
    monkeypatch.setitem(CONFIGS, "roberta-base", ("roberta", shape))
    encoder = load_tiny_encoder(save_tiny_encoder(tmp_path, "roberta-base"))
    adapters = {name: read_adapter(name, encoder.fingerprint) for name in NAMES}
    assert len(adapters[NAMES[1]].edits) == 60
    server = await start_server(model=str(tmp_path))
    assert server.info().bit_identical
    async with AsyncClient(f"127.0.0.1:{server.port}", timeout_s=200) as client:
        for name, adapter in adapters.items():
            await client.adapters.put(name, to_bytes(adapter))
        alone = {
            (name, pair): (await client.classify([pair], adapter=name)).results[0]
            for name in NAMES
            for pair in PAIRS
        }
        mixed = await asyncio.gather(*(client.classify(PAIRS, adapter=name) for name in NAMES))
    for name, answer in zip(NAMES, mixed, strict=True):
        for pair, got in zip(PAIRS, answer.results, strict=True):
            assert got == alone[name, pair]  # exactly
            ids = encoder.tokenizer(*pair)["input_ids"]
            wanted = encoder.logits(ids, adapters[name])
            assert got.logits == pytest.approx(wanted, abs=1e-3)
            assert sum(got.scores) == pytest.approx(1)
