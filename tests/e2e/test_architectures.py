"""Every decoder family that goes through the attention interface is served; others are refused."""

import asyncio

import pytest
from conftest import load_reference, save_tiny_model
from reference import generate

from redmux import AsyncClient, FailedPreconditionError
from redmux_adapters import to_bytes

SMALL = {"vocab_size": 260, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
LLAMA = SMALL | {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
}  # fmt: skip
GPT = SMALL | {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
NEOX = {k: v for k, v in LLAMA.items() if k not in ("num_key_value_heads", "head_dim")}
FAMILIES = {
    "llama": LLAMA,
    "mistral": LLAMA | {"sliding_window": 9},
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma": LLAMA,
    "gemma2": LLAMA | {"sliding_window": 9, "attn_logit_softcapping": 5.0,
                       "query_pre_attn_scalar": 16},
    "gemma3_text": LLAMA | {"sliding_window": 9, "query_pre_attn_scalar": 16},
    "phi3": NEOX | {"num_key_value_heads": 2},
    "gpt2": GPT,
    "gpt_neox": NEOX,
    "opt": SMALL | {"hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2,
                    "num_attention_heads": 4, "max_position_embeddings": 128,
                    "word_embed_proj_dim": 64},
}  # fmt: skip


def folder_of(family, options, tmp_path):
    from transformers import AutoConfig

    return save_tiny_model(tmp_path, AutoConfig.for_model(family, **options))


@pytest.mark.parametrize("family", FAMILIES)
async def test_a_family_s_tokens_and_logprobs_equal_the_reference(family, start_server, tmp_path):
    folder = folder_of(family, FAMILIES[family], tmp_path)
    base = load_reference(folder)
    server = await start_server(model=str(folder), max_running=8, max_batch_tokens=24)
    adapters = [base.adapter(seed) for seed in range(2)]
    prompts = ["Hello", "a longer prompt, cut into several chunks of tokens"]
    options = {"max_tokens": 10, "ignore_eos": True, "logprobs": True}
    async with AsyncClient(f"127.0.0.1:{server.port}") as client:
        for i, adapter in enumerate(adapters):
            await client.adapters.put(f"a{i}", to_bytes(adapter))
        work = [(p, a) for p in prompts for a in (None, 0, 1)]
        results = await asyncio.gather(
            *(client.generate(p, adapter=a if a is None else f"a{a}", **options) for p, a in work)
        )
    for (prompt, index), got in zip(work, results, strict=True):
        edits = None if index is None else adapters[index].edits
        ids = base.tokenizer(prompt)["input_ids"]
        tokens, logprobs = generate(base.model, ids, 10, edits)
        assert list(got.token_ids) == tokens
        assert got.logprobs == pytest.approx(logprobs, abs=5e-4)


@pytest.mark.parametrize(
    ("family", "options"),
    {
        "falcon": SMALL | {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
        "bloom": SMALL | {"hidden_size": 64, "n_layer": 2, "n_head": 4},
    }.items(),
)
async def test_a_family_outside_the_attention_interface_is_refused(
    family, options, start_server, tmp_path
):
    folder = folder_of(family, options, tmp_path)
    with pytest.raises(FailedPreconditionError, match=f"{family}.*attention"):
        await start_server(model=str(folder))
