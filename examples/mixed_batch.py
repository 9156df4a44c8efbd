"""Start a server with the bundled adapters, send one mixed batch, show it, keep serving.

Everything but the start goes through the public client; `--once` stops after the batch.
"""

import argparse
import asyncio
import contextlib
import json
import subprocess
import sys
import textwrap
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from redmux import AsyncClient, Completion, DeadlineExceededError

ZOO = Path(__file__).resolve().parents[1] / "adapters" / "redmux_adapters" / "zoo"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--once", action="store_true", help="stop after the batch")
    parser.add_argument("--port", type=int, default=50051)
    parser.add_argument("--http-port", type=int, default=8000)
    parser.add_argument("--metrics-port", type=int, default=9095)
    args = parser.parse_args(argv)

    command = [sys.executable, "-m", "redmux", "serve", "--adapters", "zoo",
               "--port", str(args.port), "--http-port", str(args.http_port),
               "--metrics-port", str(args.metrics_port)]  # fmt: skip
    print("starting:", " ".join(["redmux", *command[3:]]), flush=True)
    server = subprocess.Popen(command)
    try:
        asyncio.run(show_batch(server, args.port, args.metrics_port))
        if not args.once:
            print(how_to_call(args.port, args.metrics_port), flush=True)
            return server.wait()
    except KeyboardInterrupt:
        pass
    finally:
        server.terminate()  # drains; harmless if it has ended
        server.wait()
    return 0


async def show_batch(server: "subprocess.Popen[bytes]", port: int, metrics_port: int) -> None:
    requests = []
    for request in json.loads((ZOO / "demo.json").read_text()):
        if request["adapter"] not in {r["adapter"] for r in requests}:  # once with the bare base
            requests.append({"adapter": None, "prompt": request["prompt"]})
        requests.append(request)
    async with AsyncClient(f"localhost:{port}") as client:
        await ready(client, server)
        loaded = [adapter async for adapter in client.adapters.list()]
        print(f"\n{len(loaded)} adapters are loaded:")
        for adapter in loaded:
            print(
                f"  {adapter.name:15} {adapter.size_bytes / 1024:4.0f} KiB  {adapter.description}"
            )
        print(f"\n{len(requests)} requests, sent at once, decoded in the same forward passes:")
        started = time.perf_counter()
        results = await asyncio.gather(*(ask(client, r) for r in requests))
        elapsed = time.perf_counter() - started
    prompt = None
    for request, result in zip(requests, results, strict=True):
        if request["prompt"] != prompt:
            prompt = request["prompt"]
            print()
            show("prompt", prompt)
        show(request["adapter"] or "(base model)", result.text)
    tokens = sum(result.usage.completion_tokens for result in results)
    mean = adapters_per_step(metrics_port)
    print(f"\n{tokens} tokens in {elapsed:.1f} s: {tokens / elapsed:.0f} tokens/s")
    print(f"{mean:.1f} different adapters in a forward pass on average")


async def ready(client: AsyncClient, server: "subprocess.Popen[bytes]") -> None:
    while True:
        with contextlib.suppress(DeadlineExceededError):
            return await client.wait_ready(timeout_s=1)
        if server.poll() is not None:
            raise SystemExit(server.returncode)


async def ask(client: AsyncClient, request: dict[str, str]) -> Completion:
    messages = [{"role": "user", "content": request["prompt"]}]
    return await client.generate(messages, adapter=request["adapter"], max_tokens=64)


def show(label: str, text: str) -> None:
    lines = textwrap.wrap(" ".join(text.split()), 78) or [""]
    print(f"{label:>15}  " + f"\n{'':17}".join(lines))


def adapters_per_step(metrics_port: int) -> float:
    url = f"http://localhost:{metrics_port}/metrics"
    lines = urllib.request.urlopen(url).read().decode().splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    name = "redmux_batch_distinct_adapters"
    return float(values[f"{name}_sum"]) / float(values[f"{name}_count"])


def how_to_call(port: int, metrics_port: int) -> str:
    target = "" if port == 50051 else f" --target localhost:{port}"
    return f"""
Serving on localhost:{port}; metrics on http://localhost:{metrics_port}/metrics. Call it:

  .venv/bin/redmux generate{target} --chat --adapter pirate "How do I boil an egg?"
  .venv/bin/redmux adapters put{target} mine path/to/adapter_folder

or from Python:

  import redmux
  with redmux.Client("localhost:{port}") as client:
      messages = [{{"role": "user", "content": "How do I boil an egg?"}}]
      print(client.generate(messages, adapter="pirate").text)

Ctrl-C stops it."""


if __name__ == "__main__":
    raise SystemExit(main())
