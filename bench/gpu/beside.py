"""The same decode step by others, where they are installed."""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rig import random_model

Row = dict[str, Any]


@torch.inference_mode()
def peft_lora(shape: str, device: torch.device, dtype: torch.dtype, *, smoke: bool) -> list[Row]:
    """Decode steps of transformers with PEFT's LoRA (rank 16 on down_proj), adapters mixed.

    PEFT's mixed batches run the adapters of a layer one after the other, so the number of distinct
    ones is kept to 8 and 32.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import DynamicCache

    batch, context, repeats = (4, 8, 1) if smoke else (64, 256, 5)
    config = LoraConfig(r=16, lora_alpha=16, target_modules=["down_proj"])
    model = get_peft_model(random_model(shape, device, dtype), config, adapter_name="a0")
    counts = (2,) if smoke else (8, 32)
    for i in range(1, max(counts)):
        model.add_adapter(f"a{i}", config)
    model = model.to(device=device, dtype=dtype).eval()
    prompt = torch.randint(250, (batch, context), device=device)
    rows = []
    for count in (0, *counts):
        names = [f"a{i % count}" if count else "__base__" for i in range(batch)]
        cache = DynamicCache(config=model.config)
        model(input_ids=prompt, past_key_values=cache, adapter_names=names, logits_to_keep=1)
        times = []
        for _ in range(repeats + 2):
            started_s = time.perf_counter()
            token = torch.ones(batch, 1, dtype=torch.long, device=device)
            out = model(input_ids=token, past_key_values=cache, adapter_names=names)
            out.logits[:, -1].argmax(-1).tolist()
            times.append(time.perf_counter() - started_s)
        step_s = statistics.median(times[2:] if not smoke else times)
        rows.append({"peer": "PEFT LoRA r=16", "adapters": count, "batch": batch,
                     "step ms": round(1e3 * step_s, 3)})  # fmt: skip
    return rows


def vllm_base(shape: str, device: torch.device, dtype: torch.dtype) -> list[Row]:
    """Decode speed of vLLM on the same shape without adapters: 64 requests of 256 + 128 tokens.

    The prompts' time is taken off by a second run that makes one token each.
    """
    from vllm import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / shape
        random_model(shape, torch.device("cpu"), dtype).save_pretrained(path)
        engine = LLM(str(path), skip_tokenizer_init=True, max_model_len=512, max_num_seqs=64,
                     gpu_memory_utilization=0.6, enable_prefix_caching=False)  # fmt: skip
        prompts = [
            {"prompt_token_ids": [(7 * i + 13 * j) % 1000 for j in range(256)]} for i in range(64)
        ]

        def seconds(num_tokens: int) -> float:
            params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True,
                                    detokenize=False)  # fmt: skip
            started_s = time.perf_counter()
            engine.generate(prompts, params, use_tqdm=False)
            return time.perf_counter() - started_s

        seconds(8)
        step_s = statistics.median((seconds(129) - seconds(1)) / 128 for _ in range(3))
    return [{"peer": "vLLM, no adapter", "adapters": 0, "batch": 64,
             "step ms": round(1e3 * step_s, 3)}]  # fmt: skip
