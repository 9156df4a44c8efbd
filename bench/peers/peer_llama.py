"""llama.cpp's server, with or without LoRA adapters given at its start.

Requests with different adapters are never in one batch there; they take turns.
"""

import subprocess
from collections.abc import Sequence
from typing import Any

from peer import HttpPeer


class LlamaPeer(HttpPeer):
    """`options`: server (the llama-server binary), model (a GGUF file), threads, arguments."""

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
