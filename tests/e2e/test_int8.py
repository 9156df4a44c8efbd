"""A server with rounded products: near to fp32, the same bits alone and in any batch."""

import asyncio

import pytest
import torch
from reference import edited

from redmux import AsyncClient
from redmux.errors import FailedPreconditionError
from redmux_adapters import to_bytes
from redmux_server.models.cpu import packing
from redmux_server.models.cpu.arithmetic import HAS_AVX2, HAS_BF16

needs_int8 = pytest.mark.skipif(not HAS_AVX2, reason="int8 needs AVX2")

PROMPTS = ["x", "Hello there", "A somewhat longer prompt, past one block of the cache.", "1 2 3 4"]


@pytest.fixture
async def client(start_server):
    server = await start_server(
        quantization="int8", max_running=16, max_batch_tokens=48, max_queue=64
    )
    async with AsyncClient(f"127.0.0.1:{server.port}") as client:
        yield client


@torch.inference_mode()
def logprobs(model, prompt_ids, token_ids):
    ids = torch.tensor([[*prompt_ids, *token_ids]])
    rows = model(input_ids=ids, use_cache=False).logits[0, len(prompt_ids) - 1 : -1]
    return rows.log_softmax(-1).gather(1, torch.tensor(token_ids)[:, None])[:, 0]


def distance(got, want):
    return float((torch.tensor(got) - want).abs().mean())


async def ask(client, prompt, adapter):
    return await client.generate(
        prompt, adapter=adapter, max_tokens=12, ignore_eos=True, logprobs=True
    )


@needs_int8
async def test_tokens_and_logprobs_are_the_same_alone_and_mixed(base, client, put):
    for seed in range(3):
        await put(f"a{seed}", base.adapter(seed))
    work = [(prompt, name) for prompt in PROMPTS for name in (None, "a0", "a1", "a2")]
    alone = [await ask(client, *item) for item in work]
    mixed = await asyncio.gather(*(ask(client, *item) for item in work))
    for one, other in zip(alone, mixed, strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprobs == other.logprobs


@needs_int8
async def test_adapters_of_the_fp32_base_are_applied(base, client, put):
    """The reference is plain fp32 with the edit by hand, over the tokens that were served."""
    adapter = base.adapter(0)
    await put("mine", adapter)
    for prompt in PROMPTS:
        got = await ask(client, prompt, "mine")
        ids = base.tokenizer(prompt)["input_ids"]
        with edited(base.model, adapter.edits):
            near = logprobs(base.model, ids, got.token_ids)
        far = logprobs(base.model, ids, got.token_ids)
        assert got.digest == adapter.digest
        assert distance(got.logprobs, near) < 0.05
        assert distance(got.logprobs, far) > 0.2


@needs_int8
async def test_info_tells_that_the_weights_are_int8_and_how_far_that_is_from_fp32(client, base):
    info = await client.info()
    assert any("int8 weights" in choice for choice in info.choices)
    assert any("logits within" in choice for choice in info.choices)
    assert info.base_fingerprint == base.fingerprint
    assert info.bit_identical


async def test_another_dtype_than_float32_is_refused(start_server):
    with pytest.raises(FailedPreconditionError, match=r"needs device cpu and dtype float32, not"):
        await start_server(quantization="int8", dtype="bfloat16")


async def test_a_cpu_without_int8_is_refused(start_server, monkeypatch):
    monkeypatch.setattr(packing, "HAS_VNNI", False)
    monkeypatch.setattr(packing, "HAS_AVX2", False)
    with pytest.raises(FailedPreconditionError, match=r"int8 need a CPU with AVX2"):
        await start_server(quantization="int8")


needs_bf16 = pytest.mark.skipif(not HAS_BF16, reason="this CPU has no products of bf16")


@pytest.mark.parametrize(
    ("name", "largest"),
    [
        pytest.param("bf16", 0.02, marks=needs_bf16),
        pytest.param("int4", 0.4, marks=[needs_int8, pytest.mark.slow]),  # kernels of its own
    ],
)
async def test_products_of_others_are_near_to_fp32_and_the_same_in_any_batch(
    base, start_server, name, largest
):
    server = await start_server(quantization=name, max_running=16)
    assert any(f"{name} weights" in reason for reason in server.model.reasons)
    adapter = base.adapter(0)
    async with AsyncClient(f"127.0.0.1:{server.port}") as client:
        await client.adapters.put("mine", to_bytes(adapter))
        work = [(prompt, name) for prompt in PROMPTS for name in (None, "mine")]
        alone = [await ask(client, *item) for item in work]
        mixed = await asyncio.gather(*(ask(client, *item) for item in work))
    for (prompt, name), one, other in zip(work, alone, mixed, strict=True):
        assert (one.token_ids, one.logprobs) == (other.token_ids, other.logprobs)
        with edited(base.model, adapter.edits if name else {}):
            near = logprobs(base.model, base.tokenizer(prompt)["input_ids"], one.token_ids)
        assert 0 < distance(one.logprobs, near) < largest
