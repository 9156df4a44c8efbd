"""redmux through its real server and the asynchronous client."""

import asyncio
import sys
import time
from collections.abc import Sequence

from peer import READY_TIMEOUT_S, Peer, PeerError, Wave, free_port

import redmux


class RedmuxPeer(Peer):
    """`options`: python (by default the driver's), arguments (of `redmux serve`)."""

    def __post_init__(self) -> None:
        self.port = free_port()
        self.command = [
            self.options.get("python", sys.executable), "-m", "redmux", "serve",
            "--model", str(self.models / "hf"), "--port", str(self.port), "--metrics-port", "0",
            "--max-running", str(self.limits.concurrency), "--log-level", "warning",
            *self.options.get("arguments", []),
        ]  # fmt: skip

    def wait_ready(self) -> None:  # noqa: D102
        asyncio.run(self._load_adapters())

    async def _load_adapters(self) -> None:
        async with self._client() as client:
            end = time.monotonic() + READY_TIMEOUT_S
            while await self._is_starting(client):
                self.check_alive()
                if time.monotonic() > end:
                    raise PeerError(f"{self.name} was not ready in time, see {self.log}")
            for i in range(self.limits.adapters):
                data = (self.models / "red" / f"{i:03}.safetensors").read_bytes()
                await client.adapters.put(f"{i:03}", data)

    @staticmethod
    async def _is_starting(client: redmux.AsyncClient) -> bool:
        try:
            await client.wait_ready(timeout_s=1.0)
        except redmux.DeadlineExceededError:
            return True
        return False

    def versions(self) -> dict[str, str]:  # noqa: D102
        return {"redmux": redmux.__version__} | super().versions()

    def wave(  # noqa: D102
        self, prompts: Sequence[Sequence[int]], output_tokens: int, adapters: Sequence[int | None]
    ) -> Wave:
        return asyncio.run(self._wave(prompts, output_tokens, adapters))

    async def _wave(
        self, prompts: Sequence[Sequence[int]], output_tokens: int, adapters: Sequence[int | None]
    ) -> Wave:
        async with self._client() as client:
            await client.wait_ready()  # the connection is made before the clock runs
            started = time.perf_counter()
            completions = await asyncio.gather(
                *(
                    client.generate(
                        prompt,
                        adapter=None if adapter is None else f"{adapter:03}",
                        max_tokens=output_tokens,
                        ignore_eos=True,
                    )
                    for prompt, adapter in zip(prompts, adapters, strict=True)
                )
            )
            seconds = time.perf_counter() - started
        return Wave(seconds, [list(completion.token_ids) for completion in completions])

    def _client(self) -> redmux.AsyncClient:
        return redmux.AsyncClient(f"localhost:{self.port}", timeout_s=600)
