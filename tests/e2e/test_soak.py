"""A minute and a half of everything at once; every answer is checked against the request alone."""

import asyncio
import random
import time

import psutil
import pytest

import redmux
from redmux import AsyncClient
from redmux_adapters import to_bytes

SECONDS = 90
LONG = "The quick brown fox. " * 5
PROMPTS = ["a", "some words to say", "x" * 70, LONG, LONG + "And then?", LONG[:70] + "Who?"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


async def test_answers_stay_right_and_nothing_leaks(base, start_server, tmp_path):
    rng = random.Random(1)
    versions = [base.adapter(seed) for seed in range(24)]
    options = {"max_tokens": 24, "ignore_eos": True, "logprobs": True}
    counts = dict.fromkeys(("right", "warm", "cancelled", "refused", "queue full", "replaced"), 0)
    alone = {}
    cold = await start_server(prefix_cache=False)
    async with AsyncClient(f"127.0.0.1:{cold.port}", timeout_s=120) as client:
        for adapter in (None, *versions):
            if adapter is not None:
                await client.adapters.put("solo", to_bytes(adapter), replace=True)
            for prompt in PROMPTS:
                got = await client.generate(prompt, adapter=adapter and "solo", **options)
                alone[adapter and adapter.digest, prompt] = got

    server = await start_server(
        max_running=16, max_batch_tokens=64, max_queue=24, bank_bytes=0,
        kv_cache_tokens=2048, data_dir=str(tmp_path),
    )  # fmt: skip
    async with AsyncClient(f"127.0.0.1:{server.port}", timeout_s=120) as client:
        names = [f"tenant-{i % 8}/adapter-{i}" for i in range(40)]
        for name in names:
            await client.adapters.put(name, to_bytes(rng.choice(versions)), replace=True)

        async def ask():
            prompt, name = rng.choice(PROMPTS), rng.choice([None, *names])
            count = rng.randint(1, 24)
            got = await client.generate(prompt, adapter=name, **options | {"max_tokens": count})
            expected = alone[got.digest, prompt]
            assert got.token_ids == expected.token_ids[:count]
            assert got.logprobs == expected.logprobs[:count]
            counts["right"] += 1
            counts["warm"] += got.usage.cached_prompt_tokens > 0

        async def leave():
            stream = client.stream(rng.choice(PROMPTS), adapter=rng.choice(names), **options)
            async for _ in stream:
                if rng.random() < 0.3:
                    break
            await stream.aclose()
            counts["cancelled"] += 1

        async def err():
            with pytest.raises(redmux.InvalidArgumentError):
                await client.generate("x", temperature=float("nan"))
            with pytest.raises(redmux.NotFoundError):
                await client.generate("x", adapter="nobody")
            counts["refused"] += 1

        async def replace():
            data = to_bytes(rng.choice(versions))
            await client.adapters.put(rng.choice(names), data, replace=True)
            counts["replaced"] += 1

        async def work():
            while time.monotonic() < end:
                action = rng.choices((ask, leave, err, replace), (80, 10, 5, 5))[0]
                try:
                    await action()
                except redmux.ResourceExhaustedError:
                    counts["queue full"] += 1
                    await asyncio.sleep(0.05)

        process = psutil.Process()
        end = time.monotonic() + SECONDS / 3
        await asyncio.gather(*(work() for _ in range(48)))
        settled, settled_calls = process.memory_info().rss, sum(counts.values())
        end = time.monotonic() + 2 * SECONDS / 3
        await asyncio.gather(*(work() for _ in range(48)))
        grown = process.memory_info().rss - settled
        while server.engine.num_open:
            await asyncio.sleep(0.01)
    print(counts, f"grown by {grown / 2**20:.1f} MiB")
    assert all(counts.values())
    scheduler = server.engine._scheduler
    assert scheduler._blocks.num_free == scheduler._blocks.num_blocks
    assert not any(scheduler._blocks._num_users)
    assert server.model.bank.num_uses == 0
    # gRPC keeps some 3 KiB of native memory per call here, client and server together.
    assert grown < (16 << 20) + 4096 * (sum(counts.values()) - settled_calls)
