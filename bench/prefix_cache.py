"""What a cached prefix saves: the time to the first token of a prompt, cold and then warm.

A real server process and the real client on loopback. Every round has a prefix of its own, sent
twice with different ends; the medians and the median of the rounds' ratios are printed.
"""

import argparse
import random
import statistics
import time
from collections.abc import Sequence

import redmux
from redmux_bench.rounds import in_turn, median_ratio
from redmux_bench.server_process import ServerProcess


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--prefix-tokens", type=int, default=448)
    parser.add_argument("--end-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args(argv)
    with (
        ServerProcess("--model", args.model) as server,
        redmux.Client(server.address, timeout_s=600) as client,
    ):
        measure(args, client)


def measure(args: argparse.Namespace, client: redmux.Client) -> None:
    rng = random.Random(0)
    vocab_size = client.info().vocab_size
    prefix: list[int] = []
    cached = 0

    def tokens(count: int) -> list[int]:
        return [rng.randrange(100, vocab_size) for _ in range(count)]

    def first_token_s(is_cold: bool) -> float:
        nonlocal prefix, cached
        if is_cold:
            prefix = tokens(args.prefix_tokens)
        prompt = prefix + tokens(args.end_tokens)
        started = time.perf_counter()
        (chunk,) = client.stream(prompt, max_tokens=1, ignore_eos=True)
        elapsed_s = time.perf_counter() - started
        assert chunk.usage is not None
        cached = chunk.usage.cached_prompt_tokens
        assert bool(cached) is not is_cold
        return elapsed_s

    cold, warm = in_turn(args.rounds, lambda: first_token_s(True), lambda: first_token_s(False))
    print(f"prompt of {args.prefix_tokens + args.end_tokens} tokens, {cached} of them cached")
    print(f"cold:  {1e3 * statistics.median(cold):7.1f} ms to the first token")
    print(f"warm:  {1e3 * statistics.median(warm):7.1f} ms")
    print(f"ratio: {median_ratio(cold, warm):7.1f}")


if __name__ == "__main__":
    main()
