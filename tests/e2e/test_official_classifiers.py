"""The classifiers that the authors of RED published, on RoBERTa-base's shape, through a server."""

import asyncio

import pytest
import torch
from encoders import CONFIGS, load_tiny_encoder, save_tiny_encoder
from official import official

from redmux import AsyncClient
from redmux_adapters import Adapter, Edit, Head, HeadConfig, to_bytes
from redmux_adapters.convert import Options, Target, convert

# Largest difference of a logit, relative to the largest of its row: fp32 sums in two orders.
TOLERANCE = 1e-4
NAMES = ("roberta-base-qnli", "roberta-base-qnli-redpp")
PAIRS = [("Who wrote it?", "It was written in 1841."), ("Where?", "In Rome, as far as is known.")]


def read_adapter(name, fingerprint, num_layers):
    """What the authors' files hold for the first layers, without our importer."""
    vectors = torch.load(official(name), map_location="cpu", weights_only=True)
    sites = {key.partition(".delta_vector.")[0] for key in vectors}
    sites = {site for site in sites if int(site.split(".")[2]) < num_layers}
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


def imported(name, by_hand):
    """The adapter as our importer makes it of the same folder, cut to the same layers."""
    options = Options(labels=by_hand.head.config.labels)
    whole = convert(official(name).parent, Target(by_hand.base_fingerprint), options).adapter
    kept = {site: edit for site, edit in whole.edits.items() if site in by_hand.edits}
    return Adapter(whole.base_fingerprint, kept, head=whole.head)


async def check_served(num_layers, start_server, tmp_path, monkeypatch):
    """Imported files through a server, against the files' tensors by hand in transformers."""
    shape = {"vocab_size": 300, "max_position_embeddings": 514, "type_vocab_size": 1,
             "layer_norm_eps": 1e-5, "num_hidden_layers": num_layers}  # fmt: skip
    monkeypatch.setitem(CONFIGS, "roberta-base", ("roberta", shape))
    encoder = load_tiny_encoder(save_tiny_encoder(tmp_path, "roberta-base"))
    by_hand = {name: read_adapter(name, encoder.fingerprint, num_layers) for name in NAMES}
    assert len(by_hand[NAMES[1]].edits) == 5 * num_layers
    server = await start_server(model=str(tmp_path))
    assert (await server.info()).bit_identical
    async with AsyncClient(f"127.0.0.1:{server.port}", timeout_s=600) as client:
        for name, adapter in by_hand.items():
            await client.adapters.put(name, to_bytes(imported(name, adapter)))
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
            wanted = encoder.logits(ids, by_hand[name])
            largest = max(map(abs, wanted))
            assert got.logits == pytest.approx(wanted, abs=TOLERANCE * largest)
            assert sum(got.scores) == pytest.approx(1)


@pytest.mark.slow
async def test_the_authors_classifiers_on_two_layers_of_roberta_base(
    start_server, tmp_path, monkeypatch
):
    """Random weights: theirs are not at hand, and no matter for equality."""
    await check_served(2, start_server, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.timeout(1800)
async def test_the_authors_classifiers_on_the_whole_of_roberta_base(
    start_server, tmp_path, monkeypatch
):
    await check_served(12, start_server, tmp_path, monkeypatch)
