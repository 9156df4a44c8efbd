"""`redmux bench engine` without engine and server: in which order the ways are measured."""

import argparse
import contextlib
from types import SimpleNamespace

from redmux_bench import engine
from redmux_bench.engine import _Turn
from redmux_bench.workload import Lengths


async def test_every_way_is_first_as_often_as_the_others(monkeypatch):
    order = []

    async def alone(lone, requests):
        order.append("engine")
        return _Turn(1, 1, 0)

    async def through(running, process, door):
        running.close()
        order.append(door)
        return _Turn(1, 1, 1, 1)

    async def nothing():
        pass

    @contextlib.asynccontextmanager
    async def client():
        yield

    monkeypatch.setattr(engine, "_alone", alone)
    monkeypatch.setattr(engine, "_through", through)
    lone = SimpleNamespace(
        vocab_size=50, engine=SimpleNamespace(start=lambda: None, stop=nothing)
    )  # fmt: skip
    process = SimpleNamespace(address="127.0.0.1:1", http_port=1, client=client)
    options = argparse.Namespace(
        prompt_tokens=Lengths(2, 2),
        output_tokens=Lengths(2, 2),
        model="",
        timeout=1,
        concurrency=1,
        rounds=3,
        seed=0,
    )  # fmt: skip
    row = await engine._measure(options, lone, process)
    rounds = [order[i : i + 3] for i in range(3, len(order), 3)]  # without the one to warm up
    assert len(rounds) == len(row["engine_rounds"]) == 3
    for place in zip(*rounds, strict=True):
        assert sorted(place) == ["HTTP", "engine", "gRPC"]
