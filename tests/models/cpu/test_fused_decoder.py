"""FusedDecoder: what it takes on, and that it computes what transformers computes."""

import pytest
import torch
from conftest import save_tiny_model
from reference import edited

from redmux_adapters import Adapter, Edit, editable_sites, load_base, with_layer_norms
from redmux_server.config import ServerConfig
from redmux_server.device import choose
from redmux_server.engine.blocks import BlockPool
from redmux_server.engine.request import Request, SamplingParams, Work
from redmux_server.models.causal.runner import TransformersDecoder
from redmux_server.models.cpu.fused_decoder import FusedDecoder, why_not_fusable
from redmux_server.models.cpu.reservation import Reservation
from redmux_server.models.kvcache import BLOCK
from redmux_server.models.load_causal import load_causal

SHAPE = {
    "vocab_size": 260, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 20, "max_position_embeddings": 256,
}  # fmt: skip
FAMILIES = {
    "llama": SHAPE | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "mistral": SHAPE | {"sliding_window": 9},
    "qwen2": SHAPE | {"head_dim": 8},
    "qwen3": SHAPE | {"tie_word_embeddings": False},
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """(plain model, loaded model, sites) of a random model with biases, if it has any."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(request.param, **FAMILIES[request.param])
    folder = save_tiny_model(tmp_path_factory.mktemp(request.param), config)
    plain, _ = load_base(str(folder), torch.float32)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in plain.named_parameters():
        if name.endswith("bias") or "norm" in name:
            parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    plain.save_pretrained(folder)
    threads = torch.get_num_threads()
    server = ServerConfig(model=str(folder), kv_cache_tokens=1024)
    choices = choose(server)
    loaded = load_causal(server, choices, Reservation(folder, choices))
    torch.set_num_threads(threads)
    return plain, loaded, with_layer_norms(editable_sites(plain))


def adapter(sites, seed):
    generator = torch.Generator().manual_seed(seed)
    chosen = list(sites)[seed % 3 :: 3] if seed else list(sites)
    return Adapter(
        "base",
        {
            site: Edit(
                1 + 0.3 * torch.randn(sites[site], generator=generator),
                0.2 * torch.randn(sites[site], generator=generator),
            )
            for site in chosen
        },
    )


def request(loaded, pool, prompt, adapter):
    made = Request(
        prompt_ids=prompt, max_tokens=8, sampling=SamplingParams(), stop_token_ids=frozenset(),
        tenant="", adapter=adapter, logprobs=False, sink=lambda event: None,
    )  # fmt: skip
    made.blocks = pool.allocate(made.max_length)
    if adapter is not None:
        made.slot = loaded.bank.acquire(adapter.digest, adapter.edits)
    return made


def test_logits_of_a_mixed_step_equal_transformers_with_every_site_edited(family):
    plain, loaded, sites = family
    pool = BlockPool(loaded.num_blocks, BLOCK)
    adapters = [None, *(adapter(sites, seed) for seed in range(3))]
    prompts = [[(7 * i + 3 * j) % 250 + 5 for j in range(9 + 13 * i)] for i in range(4)]
    requests = [request(loaded, pool, p, a) for p, a in zip(prompts, adapters, strict=True)]
    got = []
    for chunk in (8, 100):  # no row of the first step is sampled
        work = [Work(r, min(chunk, len(r.prompt_ids) - r.num_computed)) for r in requests]
        got = loaded.runner.forward(work)
        for item in work:
            item.request.num_computed += item.count
    assert got.shape == (4, 260)
    for prompt, chosen, row in zip(prompts, adapters, got, strict=True):
        with torch.inference_mode(), edited(plain, chosen.edits if chosen else {}):
            want = plain(input_ids=torch.tensor([prompt])).logits[0, -1]
        torch.testing.assert_close(row, want, atol=2e-4, rtol=1e-4)


def test_these_families_are_fused_and_bit_identical(family):
    _, loaded, _ = family
    assert any("fused" in reason for reason in loaded.reasons)
    assert loaded.bit_identical


def test_the_values_of_tied_embeddings_are_kept_once(family):
    plain, loaded, _ = family
    decoder = loaded.runner._decoder
    embeddings = plain.get_input_embeddings()
    assert (decoder.embeddings is None) == plain.config.tie_word_embeddings
    ids = torch.tensor([0, 259, 17, 31, 32, 17])
    assert torch.equal(decoder._embed(ids), embeddings(ids))


def test_a_model_that_the_fused_form_gets_wrong_runs_as_transformers_has_it(
    tiny_folder, monkeypatch, caplog
):
    """Whatever a new version of transformers changes in a layer, the check at start sees it."""
    right = FusedDecoder.__call__
    monkeypatch.setattr(FusedDecoder, "__call__", lambda self, *step: 1.1 * right(self, *step))
    threads = torch.get_num_threads()
    config = ServerConfig(model=str(tiny_folder), kv_cache_tokens=1024)
    loaded = load_causal(config, choose(config))
    torch.set_num_threads(threads)
    assert isinstance(loaded.runner._decoder, TransformersDecoder)
    assert "not fused" in caplog.text


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("gemma", SHAPE, "GemmaForCausalLM is none of"),
        ("llama", SHAPE | {"hidden_act": "gelu"}, "its activation is gelu"),
    ],
)
def test_other_layers_are_left_alone_for_a_reason(kind, options, reason):
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options))
    assert reason in why_not_fusable(model)
