"""A server put together as for a GPU, on the CPU: with graphs, without, and when things fail."""

import asyncio

import pytest
import torch
from conftest import load_reference, save_tiny_model
from models.cuda.device_rig import FakeCapture, GraphableAttention
from reference import edited, generate

from redmux import AsyncClient, FailedPreconditionError
from redmux_adapters import to_bytes
from redmux_server.models import load_causal
from redmux_server.models.causal.selfcheck import min_cache_tokens
from redmux_server.models.cuda import runtime
from redmux_server.models.cuda.paged_torch import TorchAttention
from redmux_server.models.cuda.runner import DeviceRunner

REASON = "attention: chosen by the test"


class BigPages(GraphableAttention):
    """Pages much larger than the default."""

    block_size = 256


class WrongWhenStatic(GraphableAttention):
    def __call__(self, step, rule, query, keys, values):
        out = super().__call__(step, rule, query, keys, values)
        return out * 1.5 if step.is_static else out


@pytest.fixture
def graphs():
    return []


@pytest.fixture
def on_device(monkeypatch, graphs):
    """Makes servers start as on a GPU, with this attention."""

    def use(attention):
        monkeypatch.setattr(
            load_causal, "_on_cpu", lambda *parts: load_causal._on_device(*parts[:4])
        )
        monkeypatch.setattr(runtime, "CudaCapture", lambda: FakeCapture(graphs))
        monkeypatch.setattr(runtime, "choose_attention", lambda *_: (attention, REASON))

    return use


async def ask(server, base, *, num_tokens=8):
    """Prompts on the base model and two adapters at once, against plain transformers."""
    adapters = [base.adapter(seed) for seed in range(2)]
    prompts = ["Hi", "a prompt that is cut into several chunks of tokens"]
    async with AsyncClient(f"127.0.0.1:{server.port}") as client:
        for i, adapter in enumerate(adapters):
            await client.adapters.put(f"a{i}", to_bytes(adapter))
        work = [(p, a) for p in prompts for a in (None, 0, 1)]
        results = await asyncio.gather(
            *(
                client.generate(
                    p, adapter=a if a is None else f"a{a}", max_tokens=num_tokens,
                    ignore_eos=True, logprobs=True,
                )
                for p, a in work
            )
        )  # fmt: skip
        info = await client.info()
    for (prompt, a), got in zip(work, results, strict=True):
        ids = base.tokenizer(prompt)["input_ids"]
        tokens, logprobs = generate(
            base.model, ids, num_tokens, None if a is None else adapters[a].edits
        )
        assert list(got.token_ids) == tokens
        assert got.logprobs == pytest.approx(logprobs, abs=5e-4)
    return info


@pytest.mark.parametrize("kind", [GraphableAttention, BigPages, TorchAttention])
async def test_tokens_equal_plain_transformers_edited_by_hand(
    kind, on_device, graphs, start_server, base
):
    on_device(kind())
    server = await start_server(max_running=6, max_batch_tokens=24)
    assert type(server.model.runner) is DeviceRunner
    info = await ask(server, base)
    assert REASON in info.choices
    assert "edits: torch (no CUDA device)" in info.choices
    assert info.kv_cache_tokens % kind.block_size == 0
    steps = next(c for c in info.choices if c.startswith("decode steps: "))
    if kind is TorchAttention:
        assert steps == "decode steps: launched eagerly (this attention has no fixed shape)"
        assert not graphs
    else:
        assert steps == "decode steps: CUDA graphs, one per batch size"
        assert "replay" in graphs


SMALL = {"vocab_size": 260, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
FAMILIES = {
    "gemma2": SMALL | {  # windows and soft caps
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "max_position_embeddings": 128, "sliding_window": 9, "attn_logit_softcapping": 5.0,
        "query_pre_attn_scalar": 16,
    },
    "gpt2": SMALL | {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "opt": SMALL | {  # its sites give out [tokens, dim]
        "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 128, "word_embed_proj_dim": 64,
    },
}  # fmt: skip


async def test_vectors_equal_plain_transformers_edited_by_hand(on_device, start_server, base):
    on_device(GraphableAttention())
    server = await start_server(max_running=4, max_batch_tokens=16)
    adapter, text = base.adapter(1), "a prompt that is cut into several chunks of tokens"
    async with AsyncClient(f"127.0.0.1:{server.port}") as client:
        await client.adapters.put("a", to_bytes(adapter))
        plain = await client.embed([text], pooling="mean")
        got = await client.embed([text], pooling="mean", adapter="a")
    ids = torch.tensor([base.tokenizer(text)["input_ids"]])
    for answer, edits in ((plain, {}), (got, adapter.edits)):
        with torch.inference_mode(), edited(base.model, edits):
            wanted = base.model.base_model(input_ids=ids).last_hidden_state[0].mean(0)
        torch.testing.assert_close(torch.tensor(answer.vectors[0]), wanted, atol=5e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
async def test_families_have_the_reference_s_tokens_from_graphs(
    family, on_device, graphs, start_server, tmp_path
):
    from transformers import AutoConfig

    folder = save_tiny_model(tmp_path, AutoConfig.for_model(family, **FAMILIES[family]))
    on_device(GraphableAttention())
    server = await start_server(model=str(folder), max_running=6, max_batch_tokens=24)
    await ask(server, load_reference(folder), num_tokens=12)
    assert "replay" in graphs


async def test_graphs_are_ready_and_never_made_again_for_adapters_of_the_ffn(
    on_device, graphs, start_server, base
):
    on_device(GraphableAttention())
    server = await start_server(max_running=4, max_batch_tokens=24)
    captures = graphs.count("capture")
    await ask(server, base)
    assert graphs.count("capture") == captures


async def test_graphs_that_compute_wrongly_are_not_used(on_device, graphs, start_server, base):
    on_device(WrongWhenStatic())
    server = await start_server(max_running=4, max_batch_tokens=24)
    used = graphs.count("replay")
    info = await ask(server, base)
    assert graphs.count("replay") == used
    assert "decode steps: launched eagerly" in info.choices
    (refused,) = (c for c in info.choices if c.startswith("not used: "))
    assert "CUDA graphs, one per batch size: the packed engine differs" in refused


async def test_a_device_that_cannot_capture_launches_eagerly_and_says_why(
    on_device, monkeypatch, start_server, base
):
    def fail():
        raise RuntimeError("CUDA error: operation not permitted\nwhen stream is capturing")

    on_device(GraphableAttention())
    monkeypatch.setattr(runtime, "CudaCapture", fail)
    server = await start_server(max_running=4, max_batch_tokens=24)
    info = await ask(server, base)
    assert "decode steps: launched eagerly" in info.choices
    (refused,) = (c for c in info.choices if c.startswith("not used: "))
    assert refused.endswith("CUDA graphs, one per batch size: CUDA error: operation not permitted")


async def test_attention_that_is_wrong_at_last_is_refused(on_device, start_server):
    class Wrong(TorchAttention):
        def __call__(self, *args):
            return super().__call__(*args) * 1.5

    on_device(Wrong())
    with pytest.raises(FailedPreconditionError, match="differs from the plain model"):
        await start_server(max_running=4, max_batch_tokens=24)


async def test_large_pages_round_the_cache_up_and_leave_room_for_the_check(on_device, start_server):
    on_device(BigPages())
    server = await start_server(max_running=1, max_batch_tokens=24, max_context=64)
    assert (await server.info()).kv_cache_tokens == min_cache_tokens(256) == 5 * 256


def test_an_architecture_whose_ffn_is_not_known_reserves_no_sites(base):
    from transformers import CohereConfig, CohereForCausalLM

    config = CohereConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                          num_attention_heads=2, num_key_value_heads=1, pad_token_id=0)  # fmt: skip
    assert runtime._expected_sites(CohereForCausalLM(config)) == {}
    assert runtime._expected_sites(base.model) == base.ffn


def test_the_default_runtime_of_a_cpu_is_torch_without_graphs():
    chosen = runtime.DeviceRuntime.choose([], torch.device("cpu"), torch.float32, 1)
    assert not chosen.uses_graphs
    assert chosen.reasons == (
        "attention: torch over gathered pages",
        "edits: torch (no CUDA device)",
    )
