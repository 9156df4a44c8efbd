"""What a cached prefix saves: the time to the first token of a prompt, cold and then warm.

A real server process and the real client on loopback. Every round has a prefix of its own, sent
twice with different ends; the medians and the median of the rounds' ratios are printed.
"""

import argparse
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

import redmux


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--prefix-tokens", type=int, default=448)
    parser.add_argument("--end-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args(argv)
    port, metrics_port = 50073, 9173
    command = [sys.executable, "-m", "redmux", "serve", "--model", args.model,
               "--port", str(port), "--metrics-port", str(metrics_port), "--log-level", "warning",
               ]  # fmt: skip
    server = subprocess.Popen(command)
    try:
        with redmux.Client(f"localhost:{port}", timeout_s=600) as client:
            client.wait_ready(timeout_s=300)
            measure(args, client)
    finally:
        server.terminate()
        server.wait()


def measure(args: argparse.Namespace, client: redmux.Client) -> None:
    rng = random.Random(0)
    vocab_size = client.info().vocab_size

    def tokens(count: int) -> list[int]:
        return [rng.randrange(100, vocab_size) for _ in range(count)]

    def first_token_s(prompt: list[int]) -> tuple[float, int]:
        """Returns the time to the first token and how many prompt tokens were cached."""
        started = time.perf_counter()
        (chunk,) = client.stream(prompt, max_tokens=1, ignore_eos=True)
        assert chunk.usage is not None
        return time.perf_counter() - started, chunk.usage.cached_prompt_tokens

    cold: list[float] = []
    warm: list[float] = []
    for round_index in range(1 + args.rounds):
        prefix = tokens(args.prefix_tokens)
        cold_s, none = first_token_s(prefix + tokens(args.end_tokens))
        warm_s, cached = first_token_s(prefix + tokens(args.end_tokens))
        assert none == 0
        if round_index:  # the first one warms up
            cold.append(cold_s)
            warm.append(warm_s)
    ratio = statistics.median(c / w for c, w in zip(cold, warm, strict=True))
    print(f"prompt of {args.prefix_tokens + args.end_tokens} tokens, {cached} of them cached")
    print(f"cold:  {1e3 * statistics.median(cold):7.1f} ms to the first token")
    print(f"warm:  {1e3 * statistics.median(warm):7.1f} ms")
    print(f"ratio: {ratio:7.1f}")


if __name__ == "__main__":
    main()
