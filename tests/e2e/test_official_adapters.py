"""The adapters that the authors of RED published, served, against their vectors applied by hand.

Base models have the real configurations and random weights; the small ones in the default suite
keep the first layers, and of the adapters what edits these. Reference and server share nothing:
the reference reads the authors' file with torch and computes h * scale + bias in a hook.
"""

import asyncio
import contextlib
from collections import defaultdict

import pytest
import torch
from conftest import save_tiny_model
from official import official

from redmux import AsyncClient
from redmux_adapters import Adapter, load_base, load_seq2seq_base, to_bytes
from redmux_adapters.convert import Options, Target, convert

# Largest difference of a logit, relative to the largest logit of its row: fp32 sums in two orders.
TOLERANCE = 2e-5
NUM_TOKENS = 4
PROMPTS = ["name[Blue Spice], eatType[coffee shop], area[city centre] ||", "Below is an", "x"]
GPT2_MEDIUM = {"n_embd": 1024, "n_layer": 24, "n_head": 16}
LLAMA2_7B = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32,
    "num_key_value_heads": 32, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096,
    "num_hidden_layers": 32,
}  # fmt: skip
T5_BASE = {
    "d_model": 768, "d_kv": 64, "d_ff": 3072, "num_heads": 12, "num_layers": 12,
    "decoder_start_token_id": 0,
}  # fmt: skip
BYTES = {"vocab_size": 260, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def vectors(name, num_layers):
    """{module path: [scale, bias]} as the authors saved them, of the first layers."""
    sites = defaultdict(lambda: [None, None])
    for key, value in torch.load(official(name), map_location="cpu", weights_only=True).items():
        site, _, kind = key.rpartition(".delta_vector.activation_")
        site = site.removeprefix("module.").removeprefix("base_model.")
        layer = next(int(part) for part in site.split(".") if part.isdigit())
        if layer < num_layers:
            sites[site][("scaling", "bias").index(kind)] = value.float()  # [1, dim]
    return sites


@contextlib.contextmanager
def by_hand(model, sites):
    """Edits the outputs of the modules at these paths inside the block."""
    with contextlib.ExitStack() as stack:
        for path, (scale, bias) in sites.items():
            hook = model.get_submodule(path).register_forward_hook(
                lambda module, args, h, scale=scale, bias=bias: h * scale + bias
            )
            stack.callback(hook.remove)
        yield


def imported(name, fingerprint, num_layers, sites):
    """The adapter as our importer makes it of the file, cut to the first layers."""
    adapter = convert(official(name), Target(fingerprint), Options()).adapter
    kept = {site: edit for site, edit in adapter.edits.items() if site in sites}
    assert len(adapter.edits) * num_layers % len(kept) == 0
    return Adapter(fingerprint, kept)


class Logits:
    """What the engine computed for each token that it drew, by (adapter, tokens so far)."""

    def __init__(self, server, monkeypatch):
        self.rows = {}
        self._forward = server.model.runner.forward
        monkeypatch.setattr(server.model.runner, "forward", self._record)

    def _record(self, work):
        logits = self._forward(work)
        drawn = [item.request for item in work if item.samples]
        for request, row in zip(drawn, logits, strict=True):
            ids = (*request.source_ids, *request.token_ids)
            key = request.adapter and request.adapter.digest, ids
            self.rows[key] = row.clone()
        return logits

    def take(self):
        rows, self.rows = self.rows, {}
        return rows


def difference(row, want):
    """The largest difference of two rows of logits, relative to the largest logit."""
    return float((row - want).abs().max() / want.abs().max())


@torch.inference_mode()
def next_logits(model, source, drawn):
    """What plain transformers computes behind a prompt and the tokens drawn so far."""
    if model.config.is_encoder_decoder:
        target = torch.tensor([[model.config.decoder_start_token_id, *drawn]])
        inputs = {"input_ids": torch.tensor([source]), "decoder_input_ids": target}
    else:
        inputs = {"input_ids": torch.tensor([[*source, *drawn]])}
    return model(**inputs, use_cache=False).logits[0, -1]


async def check_served(config, names, num_layers, start_server, tmp_path, monkeypatch):
    """Base model and adapters, alone and mixed: bits, logits and tokens."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    folder = save_tiny_model(tmp_path, config, gain=1, kind=kind)
    server = await start_server(
        model=str(folder), max_running=16, max_batch_tokens=24, max_context=128,
        prefix_cache=False,
    )  # fmt: skip
    engine = Logits(server, monkeypatch)
    edits = {name: vectors(name, num_layers) for name in names}
    digests = {None: None}
    options = {"max_tokens": NUM_TOKENS, "ignore_eos": True}
    work = [(prompt, name) for prompt in PROMPTS for name in (None, *names)]
    async with AsyncClient(f"127.0.0.1:{server.port}", timeout_s=600) as client:
        for name, sites in edits.items():
            adapter = imported(name, server.model.fingerprint, num_layers, sites)
            digests[name] = (await client.adapters.put(name, to_bytes(adapter))).digest
        alone = [await client.generate(p, adapter=a, **options) for p, a in work]
        alone_rows = engine.take()
        mixed = await asyncio.gather(*(client.generate(p, adapter=a, **options) for p, a in work))
        mixed_rows = engine.take()
    assert len(alone_rows) == len(work) * NUM_TOKENS
    assert alone_rows.keys() == mixed_rows.keys()
    assert all(torch.equal(row, mixed_rows[key]) for key, row in alone_rows.items())
    load = load_seq2seq_base if config.is_encoder_decoder else load_base
    model, tokenizer = load(str(folder))
    start = (config.decoder_start_token_id,) if config.is_encoder_decoder else ()
    for (prompt, name), one, other in zip(work, alone, mixed, strict=True):
        source = tokenizer(prompt)["input_ids"]
        with by_hand(model, edits.get(name, {})):
            for i, token_id in enumerate(one.token_ids):
                drawn = one.token_ids[:i]
                want = next_logits(model, source, drawn)
                row = alone_rows[digests[name], (*source, *start, *drawn)]
                assert difference(row, want) < TOLERANCE
                assert int(want.argmax()) == token_id
        assert one == other
    # An adapter that was not applied would be seen: it changes far more than the tolerance.
    first = (*tokenizer("x")["input_ids"], *start)
    base_row, *rows = (alone_rows[digest, first] for digest in digests.values())
    assert all(difference(row, base_row) > 50 * TOLERANCE for row in rows)


@pytest.mark.slow
async def test_red_and_red_pp_of_gpt2_medium_cut_to_two_layers(start_server, tmp_path, monkeypatch):
    from transformers import GPT2Config

    config = GPT2Config(**GPT2_MEDIUM | BYTES | {"n_layer": 2})
    names = ["gpt2-medium-e2e", "gpt2-medium-e2e-redpp"]
    await check_served(config, names, 2, start_server, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.timeout(1800)
async def test_red_and_red_pp_of_gpt2_medium_whole(start_server, tmp_path, monkeypatch):
    from transformers import GPT2Config

    config = GPT2Config(**GPT2_MEDIUM)
    names = ["gpt2-medium-e2e", "gpt2-medium-e2e-redpp"]
    await check_served(config, names, 24, start_server, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.timeout(1800)
async def test_red_of_llama_2_7b_cut_to_two_layers(start_server, tmp_path, monkeypatch):
    from transformers import LlamaConfig

    config = LlamaConfig(**LLAMA2_7B | BYTES | {"num_hidden_layers": 2})
    await check_served(config, ["llama2-7b"], 2, start_server, tmp_path, monkeypatch)


async def test_red_of_t5_base_cut_to_two_layers(start_server, tmp_path, monkeypatch):
    from transformers import T5Config

    config = T5Config(**T5_BASE | BYTES | {"num_layers": 2})
    await check_served(config, ["t5-base-qnli"], 2, start_server, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.timeout(1800)
async def test_red_of_t5_base_whole(start_server, tmp_path, monkeypatch):
    from transformers import T5Config

    config = T5Config(**T5_BASE)
    await check_served(config, ["t5-base-qnli"], 12, start_server, tmp_path, monkeypatch)
