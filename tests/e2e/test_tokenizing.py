"""Tokenizing, which may take long, holds up neither other tenants nor the end of a server."""

import asyncio
import threading

import pytest

import redmux
from redmux import AsyncClient

KEYS = ("a" * 32, "b" * 32)


class Held:
    """Lets a server's tokenizing wait, and notes what it began."""

    def __init__(self, server, monkeypatch):
        self.opens, self.began = threading.Event(), []
        encode = server.model.codec.encode

        def wait(text, most=None):
            self.began.append(text)
            self.opens.wait()
            return encode(text, most)

        monkeypatch.setattr(type(server.model.codec), "encode", lambda _, *args: wait(*args))

    async def until(self, number):
        while len(self.began) < number:
            await asyncio.sleep(0)


async def test_a_stop_does_not_wait_for_what_is_tokenized(start_server, monkeypatch):
    server = await start_server()
    held = Held(server, monkeypatch)
    async with AsyncClient(f"127.0.0.1:{server.port}") as client:
        calls = [asyncio.ensure_future(client.generate(text, max_tokens=1)) for text in "xy"]
        await held.until(1)
        await server.stop(drain_s=60)
        for call in calls:
            with pytest.raises(redmux.UnavailableError):
                await call
    assert len(held.began) == 1
    held.opens.set()


async def test_a_tenant_with_much_to_tokenize_lets_another_go_first(start_server, monkeypatch):
    server = await start_server(api_keys=KEYS, max_queue=64)
    held = Held(server, monkeypatch)
    target = f"127.0.0.1:{server.port}"
    async with (
        AsyncClient(target, api_key=KEYS[0]) as much,
        AsyncClient(target, api_key=KEYS[1]) as little,
    ):
        calls = [asyncio.ensure_future(much.generate("x" * 90, max_tokens=1)) for _ in range(20)]
        await held.until(1)
        waiting = server._tokenizing._waiting
        while sum(map(len, list(waiting.values()))) < 19:
            await asyncio.sleep(0)
        calls.append(asyncio.ensure_future(little.generate("y", max_tokens=1)))
        while len(waiting) < 2:
            await asyncio.sleep(0)
        held.opens.set()
        await asyncio.gather(*calls)
    assert held.began.index("y") <= 2
