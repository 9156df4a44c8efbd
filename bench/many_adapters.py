"""What many adapters cost: the same load with no adapter and with one adapter per request.

A real server process and the real client on loopback. Rounds alternate, so that whatever else the
machine does meets both; the medians and their ratio are printed. Also times how long an adapter
takes from being put to its first token, against the same request on a resident adapter.
"""

import argparse
import asyncio
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

import torch

import redmux
from redmux_adapters import Adapter, Edit, to_bytes
from redmux_adapters.base import load_base
from redmux_adapters.sites import ffn_sites


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    sites = ffn_sites(load_base(args.model)[0])
    port, metrics_port = 50071, 9171
    command = [sys.executable, "-m", "redmux", "serve", "--model", args.model,
               "--port", str(port), "--metrics-port", str(metrics_port),
               "--max-running", str(max(64, args.concurrency)), "--log-level", "warning",
               "--prefix-cache", "false",  # rounds repeat their prompts
               ]  # fmt: skip
    server = subprocess.Popen(command)
    try:
        asyncio.run(measure(args, f"localhost:{port}", sites))
    finally:
        server.terminate()
        server.wait()


def random_adapter(base: str, sites: dict[str, int], seed: int) -> bytes:
    generator = torch.Generator().manual_seed(seed)
    edits = {
        site: Edit(
            1 + 0.1 * torch.randn(dim, generator=generator),
            0.05 * torch.randn(dim, generator=generator),
        )
        for site, dim in sites.items()
    }
    return to_bytes(Adapter(base, edits))


async def measure(args: argparse.Namespace, target: str, sites: dict[str, int]) -> None:
    async with redmux.AsyncClient(target, timeout_s=600) as client:
        await client.wait_ready()
        info = await client.info()
        for choice in info.choices:
            print(choice)
        names = [f"adapter-{i}" for i in range(args.concurrency)]
        for i, name in enumerate(names):
            await client.adapters.put(name, random_adapter(info.base_fingerprint, sites, i))

        async def ask(index: int, name: str | None, tokens: int) -> None:
            prompt = [(7 * index + 31 * i) % 1000 + 100 for i in range(args.prompt_tokens)]
            await client.generate(prompt, adapter=name, max_tokens=tokens, ignore_eos=True)

        async def wave(assigned: Sequence[str | None]) -> float:
            started = time.perf_counter()
            await asyncio.gather(
                *(ask(i, name, args.output_tokens) for i, name in enumerate(assigned))
            )
            return args.concurrency * args.output_tokens / (time.perf_counter() - started)

        base: list[float] = []
        mixed: list[float] = []
        await wave(names)  # warm up
        for _ in range(args.rounds):
            base.append(await wave([None] * args.concurrency))
            mixed.append(await wave(names))
        print(f"base only:             {statistics.median(base):7.1f} tokens/s  {rounded(base)}")
        print(f"{args.concurrency} distinct adapters:  {statistics.median(mixed):7.1f} tokens/s  "
              f"{rounded(mixed)}")  # fmt: skip
        ratios = [m / b for m, b in zip(mixed, base, strict=True)]
        print(f"ratio:                 {statistics.median(ratios):7.3f}")

        resident: list[float] = []
        fresh: list[float] = []
        for i in range(4 * args.rounds):
            started = time.perf_counter()
            await ask(i, names[0], 1)
            resident.append(time.perf_counter() - started)
            data = random_adapter(info.base_fingerprint, sites, 1000 + i)
            started = time.perf_counter()
            await client.adapters.put(f"fresh-{i}", data)
            await ask(i, f"fresh-{i}", 1)
            fresh.append(time.perf_counter() - started)
        extra = statistics.median(f - r for f, r in zip(fresh, resident, strict=True))
        first_s, other_s = statistics.median(fresh), statistics.median(resident)
        print(f"put to first token:    {1e3 * first_s:7.1f} ms, resident {1e3 * other_s:.1f} ms, "
              f"difference {1e3 * extra:.1f} ms")  # fmt: skip


def rounded(values: Sequence[float]) -> list[int]:
    return [round(v) for v in values]


if __name__ == "__main__":
    main()
