"""Adapters that come, change and go while requests run."""

import asyncio
import contextlib
import sqlite3

import pytest

from redmux import AsyncClient, DataLossError, FailedPreconditionError, NotFoundError
from redmux_adapters import to_bytes


def record_steps(server):
    """Notes for each step which requests it worked on."""
    steps = []
    forward = server.model.runner.forward

    def recording(work):
        steps.append({item.request for item in work})
        return forward(work)

    server.model.runner.forward = recording
    return steps


async def read(stream, chunks):
    async for chunk in stream:
        chunks.append(chunk)


async def until(condition):
    while not condition():
        await asyncio.sleep(0)


async def test_a_fresh_adapter_serves_while_no_stream_misses_a_step(base, start_server):
    server = await start_server(max_running=20, max_batch_tokens=48)
    async with AsyncClient(f"127.0.0.1:{server.port}") as client:
        await client.adapters.put("old", to_bytes(base.adapter(1)))
        outputs = [[] for _ in range(16)]
        readers = [
            asyncio.create_task(
                read(client.stream("abc", adapter="old", max_tokens=200, ignore_eos=True), chunks)
            )
            for chunks in outputs
        ]
        await until(lambda: all(outputs))
        steps = record_steps(server)
        running = list(server.engine._scheduler.running)
        assert len(running) == 16
        await client.adapters.put("new", to_bytes(base.adapter(2)))
        fresh = await client.generate("abcdef", adapter="new", max_tokens=1)
        assert fresh.digest == base.adapter(2).digest
        last = max(i for i, step in enumerate(steps) if any(r not in running for r in step))
        for step in steps[: last + 1]:
            assert all(r in step for r in running)
        assert sum(any(r not in running for r in step) for step in steps) == 1
        await asyncio.gather(*readers)
    assert all(sum(len(c.token_ids) for c in chunks) == 200 for chunks in outputs)


async def test_replacing_under_load_fails_nobody_and_mixes_no_versions(base, client, put):
    versions = [base.adapter(1), base.adapter(2)]
    expected = {}
    for adapter in versions:
        await put("x", adapter, replace=True)
        got = await client.generate("abc", adapter="x", max_tokens=8, ignore_eos=True)
        expected[adapter.digest] = got.token_ids
    assert len(set(expected.values())) == 2
    done = False
    seen = []

    async def work():
        while not done:
            got = await client.generate("abc", adapter="x", max_tokens=8, ignore_eos=True)
            assert got.token_ids == expected[got.digest]
            seen.append(got.digest)

    workers = [asyncio.create_task(work()) for _ in range(8)]
    for i in range(60):
        await put("x", versions[i % 2], replace=True)
        if i % 5 == 0:  # most replacements fall between requests, some are waited for
            await until(lambda i=i: seen and seen[-1] == versions[i % 2].digest)
    done = True
    await asyncio.gather(*workers)
    assert set(seen) == expected.keys()


async def test_a_deleted_adapter_finishes_its_requests_and_takes_no_more(base, server, client, put):
    adapter = base.adapter(1)
    await put("x", adapter)
    alone = await client.generate("abc", adapter="x", max_tokens=60, ignore_eos=True)
    chunks = []
    reader = asyncio.create_task(
        read(client.stream("abc", adapter="x", max_tokens=60, ignore_eos=True), chunks)
    )
    await until(lambda: chunks)
    await client.adapters.delete("x")
    with pytest.raises(NotFoundError, match="no adapter 'x'"):
        await client.generate("abc", adapter="x")
    await reader
    assert [t for c in chunks for t in c.token_ids] == list(alone.token_ids)
    assert {c.digest for c in chunks} == {adapter.digest}


async def test_an_adapter_is_found_by_its_digest(base, client, put):
    adapter = base.adapter(1)
    await put("acme/x", adapter)
    got = await client.generate("abc", adapter=adapter.digest, max_tokens=4)
    assert (got.adapter, got.digest) == ("acme/x", adapter.digest)


async def test_more_adapters_than_bank_rows_are_served(base, start_server):
    server = await start_server(max_running=2, max_batch_tokens=32, bank_bytes=0)
    async with AsyncClient(f"127.0.0.1:{server.port}") as client:
        adapters = [base.adapter(seed) for seed in range(9)]
        for i, adapter in enumerate(adapters):
            await client.adapters.put(f"a{i}", to_bytes(adapter))

        async def ask(i):
            return (await client.generate("abc", adapter=f"a{i}", max_tokens=5)).token_ids

        one_by_one = [await ask(i) for i in range(9)]
        together = await asyncio.gather(*(ask(i) for i in range(9)))
        assert list(together) == one_by_one
        assert server.model.bank.num_slots == 3


async def test_adapters_of_an_earlier_run_are_read_when_first_asked_for(
    base, start_server, tmp_path
):
    options = {"data_dir": str(tmp_path), "host_cache_bytes": 0}
    expected = {}
    server = await start_server(**options)
    async with AsyncClient(f"127.0.0.1:{server.port}") as client:
        for name, seed in {"a": 1, "b": 2, "c": 3}.items():
            await client.adapters.put(name, to_bytes(base.adapter(seed)))
            expected[name] = await client.generate("abc", adapter=name, max_tokens=8)
    await server.stop(drain_s=0)
    server = await start_server(**options)
    with contextlib.closing(sqlite3.connect(tmp_path / "registry.db")) as database, database:
        database.execute(
            "UPDATE blobs SET bytes = substr(bytes, 2) WHERE sha256 = (SELECT sha256 FROM versions "
            "JOIN adapters ON adapter_id = adapters.id WHERE name = 'b')"
        )
    async with AsyncClient(f"127.0.0.1:{server.port}") as client:
        listed = {adapter.name: adapter.digest async for adapter in client.adapters.list()}
        assert listed == {name: got.digest for name, got in expected.items()}
        got = await asyncio.gather(
            *(client.generate("abc", adapter=name, max_tokens=8) for name in "abca"),
            return_exceptions=True,
        )
        assert [got[0], got[2], got[3]] == [expected["a"], expected["c"], expected["a"]]
        assert isinstance(got[1], DataLossError)
        assert "version 1 of adapter 'b'" in str(got[1])


async def test_values_in_freed_blocks_reach_nobody(base, server, client, put):
    """Free blocks hold NaN, and so does every block that is handed out, shared before or not."""
    prompts = ["a", "some words", "x" * 40]
    adapters = [base.adapter(seed) for seed in range(3)]
    for i, adapter in enumerate(adapters):
        await put(f"a{i}", adapter)
    work = [(p, f"a{i}") for p in prompts for i in range(3)]

    async def ask(prompt, name):
        return await client.generate(
            prompt, adapter=name, max_tokens=40, ignore_eos=True, logprobs=True
        )

    clean = [await ask(*w) for w in work]
    pool, cache = server.engine._scheduler._blocks, server.model.runner.cache
    cache.poison(pool._free, float("nan"))
    release, take = pool.release, pool._take

    def poison_after(blocks):
        release(blocks)
        cache.poison(pool._free, float("nan"))

    def poison_taken():
        block = take()
        cache.poison([block], float("nan"))
        return block

    pool.release, pool._take = poison_after, poison_taken
    for _ in range(3):
        assert await asyncio.gather(*(ask(*w) for w in work)) == clean


async def test_an_exploding_adapter_fails_alone(base, client, put):
    from redmux_adapters import Adapter, Edit

    await put("good", base.adapter(1))
    bombs = {site: Edit(e.scale * 0 + 1e4, e.bias) for site, e in base.adapter(1).edits.items()}
    overflow = Adapter(base_fingerprint=base.fingerprint, edits=bombs)
    options = {"max_tokens": 30, "ignore_eos": True, "logprobs": True}
    alone = await client.generate("abc", adapter="good", **options)
    await put("bomb", overflow)
    good = [client.generate("abc", adapter="good", **options) for _ in range(4)]
    bad = [client.generate("abc", adapter="bomb", **options) for _ in range(3)]
    results = await asyncio.gather(*good, *bad, return_exceptions=True)
    assert all(r == alone for r in results[:4])
    assert all(not isinstance(r, Exception) or isinstance(r, FailedPreconditionError)
               for r in results[4:])  # fmt: skip


async def test_a_row_that_is_not_finite_fails_its_request_only(base, server, client, put):
    await put("good", base.adapter(1))
    await put("bad", base.adapter(2))
    options = {"max_tokens": 20, "ignore_eos": True, "logprobs": True}
    alone = await client.generate("abc", adapter="good", **options)
    fill = server.model.bank._fill
    bad = await server.registry.fetch(await server.registry.resolve("bad"))

    def poison(slot, edits):
        fill(slot, edits)
        if edits is bad.edits:
            server.model.bank._table[slot, 3] = float("nan")

    server.model.bank._fill = poison
    results = await asyncio.gather(
        *(client.generate("abc", adapter="good", **options) for _ in range(4)),
        client.generate("abc", adapter="bad", **options),
        return_exceptions=True,
    )
    assert results[:4] == [alone] * 4
    assert isinstance(results[4], FailedPreconditionError)
    assert "not finite" in str(results[4])
    assert await client.generate("abc", adapter="good", **options) == alone


async def test_an_adapter_that_is_never_finite_is_refused_until_other_content_has_its_name(
    base, server, client, put
):
    await put("bad", base.adapter(2))
    fill = server.model.bank._fill
    bad = await server.registry.fetch(await server.registry.resolve("bad"))

    def poison(slot, edits):
        fill(slot, edits)
        if edits is bad.edits:
            server.model.bank._table[slot, 3] = float("nan")

    server.model.bank._fill = poison
    for _ in range(3):
        with pytest.raises(FailedPreconditionError, match="not finite for this prompt"):
            await client.generate("abc", adapter="bad", max_tokens=2)
    steps = server.engine._num_steps
    calls = (
        client.generate("abc", adapter="bad", max_tokens=2),
        client.score("abc", ["d"], adapter="bad"),
        client.embed(["abc"], adapter="bad"),
    )
    for call in calls:
        with pytest.raises(FailedPreconditionError, match="in 3 requests in a row and is not comp"):
            await call
    assert server.engine._num_steps == steps
    await put("bad", base.adapter(3), replace=True)
    assert (await client.generate("abc", adapter="bad", max_tokens=2)).token_ids


async def test_a_cancelled_stream_gives_back_everything(base, server, client, put):
    await put("x", base.adapter(1))
    for _ in range(10):
        stream = client.stream("abc", adapter="x", max_tokens=200, ignore_eos=True)
        async for _ in stream:
            break
        await stream.aclose()
    await until(lambda: server.engine.num_open == 0)
    scheduler = server.engine._scheduler
    assert scheduler.running == []
    assert scheduler.num_waiting == 0
    assert scheduler._blocks.num_free == scheduler._blocks.num_blocks
    assert server.model.bank.num_uses == 0


async def test_only_the_culprit_of_a_failed_step_fails(base, server, client):
    alone = await client.generate("abc", max_tokens=10, ignore_eos=True)
    forward = server.model.runner.forward
    culprit = base.tokenizer("zzz")["input_ids"]

    def failing(work):
        if any(item.request.prompt_ids == culprit for item in work):
            raise RuntimeError("boom: a secret prompt")
        return forward(work)

    server.model.runner.forward = failing
    results = await asyncio.gather(
        *(client.generate("abc", max_tokens=10, ignore_eos=True) for _ in range(5)),
        client.generate("zzz", max_tokens=10),
        return_exceptions=True,
    )
    assert results[:5] == [alone] * 5
    assert "internal error" in str(results[5])
    assert "secret" not in str(results[5])


async def test_the_engine_s_death_is_told_to_everybody(server, client):
    from redmux import UnavailableError

    def broken():
        raise KeyError("corrupt state")

    server.engine._scheduler.plan = broken
    with pytest.raises(UnavailableError):
        await client.generate("abc", timeout_s=20)
    server.engine._thread.join(20)
    assert not server.engine.is_alive
    with pytest.raises(UnavailableError):
        await client.generate("abc", timeout_s=20)
