"""Versions of adapters through a real server: over gRPC, over HTTP, and while requests run."""

import asyncio

import httpx2
import pytest

import redmux
from redmux import AsyncClient
from redmux_adapters import to_bytes

OPTIONS = {"max_tokens": 6, "ignore_eos": True}


@pytest.fixture
async def versions(base, client):
    """The digests of three versions of x, of which prod is the second."""
    for seed in (1, 2, 3):
        await client.adapters.put("x", to_bytes(base.adapter(seed)), replace=True)
    await client.adapters.set_alias("x", "prod", 2)
    return {seed: base.adapter(seed).digest for seed in (1, 2, 3)}


async def test_a_request_names_a_version_and_is_told_which_it_was(client, versions):
    named = {"x": 3, "x@latest": 3, "x@1": 1, "x@prod": 2, f"x@{versions[1][:15]}": 1,
             versions[2]: 2}  # fmt: skip
    alone = {seed: await client.generate("abc", adapter=versions[seed], **OPTIONS)
             for seed in versions}  # fmt: skip
    for name, seed in named.items():
        got = await client.generate("abc", adapter=name, **OPTIONS)
        assert (got.adapter, got.digest) == ("x", versions[seed])
        assert got.token_ids == alone[seed].token_ids
        assert (await client.adapters.get(name)).version == seed
        assert (await client.score("abc", ["d"], adapter=name)).digest == versions[seed]
    with pytest.raises(redmux.NotFoundError, match="'x' has no version '9'; its newest is 3"):
        await client.generate("abc", adapter="x@9", **OPTIONS)


async def test_a_request_keeps_the_version_of_its_alias_though_that_moves(client, versions):
    alone = await client.generate("abc", adapter="x@2", max_tokens=60, ignore_eos=True)
    stream = client.stream("abc", adapter="x@prod", max_tokens=60, ignore_eos=True)
    chunks = [await anext(stream)]
    await client.adapters.set_alias("x", "prod", 3)
    await client.adapters.delete("x@2")
    chunks += [chunk async for chunk in stream]
    assert tuple(i for chunk in chunks for i in chunk.token_ids) == alone.token_ids
    assert (await client.generate("abc", adapter="x@prod", **OPTIONS)).digest == versions[3]


async def test_lists_show_versions_and_aliases(client, versions):
    (newest,) = [adapter async for adapter in client.adapters.list()]
    assert (newest.version, newest.aliases) == (3, (redmux.AdapterAlias("prod", 2),))
    found = [adapter async for adapter in client.adapters.list("x")]
    assert [(adapter.version, adapter.digest) for adapter in found] == [
        (seed, versions[seed]) for seed in (3, 2, 1)
    ]


async def test_pages_of_versions_add_up(server, client, versions):
    from redmux.v1.adapter_service_pb2 import ListAdaptersRequest

    request = ListAdaptersRequest(name="x", page_size=2)
    method = client._connection.adapters.ListAdapters
    page = await client._connection.unary(method, request)
    assert [adapter.version for adapter in page.adapters] == [3, 2]
    request.page_token = page.next_page_token
    page = await client._connection.unary(method, request)
    assert ([adapter.version for adapter in page.adapters], page.next_page_token) == ([1], "")
    request.page_token = "x"
    with pytest.raises(redmux.InvalidArgumentError, match="page_token is 'x'"):
        await client._connection.unary(method, request)


async def test_what_is_downloaded_is_what_was_put(base, client, versions):
    assert await client.adapters.download("x@prod") == to_bytes(base.adapter(2))


async def test_deleting_is_of_a_version_or_of_a_name_without_aliases(client, versions):
    for name in ("x", "x@2", "x@prod"):
        with pytest.raises(redmux.FailedPreconditionError, match="'prod' of adapter 'x'"):
            await client.adapters.delete(name)
    assert (await client.adapters.delete("x@1")).version == 1
    await client.adapters.delete_alias("x", "prod")
    assert (await client.adapters.delete("x")).version == 3
    assert [adapter async for adapter in client.adapters.list()] == []


async def test_http_names_versions_as_grpc_does(server, client, versions):
    async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{server.http_port}") as http:
        body = {"model": "x@prod", "prompt": "abc", "max_tokens": 2}
        answer = await http.post("/v1/completions", json=body)
        assert answer.headers["x-redmux-adapter"] == versions[2]
        told = (await http.get("/v1/adapters/x@1")).json()
        assert (told["id"], told["version"], told["aliases"]) == ("x", 1, {"prod": 2})
        assert (await http.get(f"/v1/models/{versions[1]}")).json()["root"] == versions[1]
        assert (await http.delete("/v1/models/x@1")).status_code == 200
        assert (await http.delete("/v1/adapters/x@2")).status_code == 412
    assert [adapter.version async for adapter in client.adapters.list("x")] == [3, 2]


async def test_files_of_a_folder_come_change_and_go_while_the_server_runs(
    base, start_server, tmp_path
):
    path, new = tmp_path / "team" / "x.safetensors", tmp_path / "new"
    path.parent.mkdir()
    server = await start_server(adapter_dir=str(tmp_path))
    async with AsyncClient(f"127.0.0.1:{server.port}") as client:

        async def until(digest):
            while True:
                try:
                    got = await client.generate("abc", adapter="team/x", max_tokens=2)
                except redmux.NotFoundError:
                    got = None
                if (got and got.digest) == digest:
                    return
                await asyncio.sleep(0)

        for seed in (1, 2):
            new.write_bytes(to_bytes(base.adapter(seed)))
            new.rename(path)
            await asyncio.wait_for(until(base.adapter(seed).digest), 60)
        assert server.metrics.registry.get_sample_value("redmux_adapters") == 1
        path.unlink()
        await asyncio.wait_for(until(None), 60)


async def test_servers_share_a_registry_in_postgresql(base, start_server, postgresql):
    place = postgresql.new_database()
    one, two = [await start_server(registry=place) for _ in range(2)]
    async with (
        AsyncClient(f"127.0.0.1:{one.port}") as first,
        AsyncClient(f"127.0.0.1:{two.port}") as second,
    ):
        await first.adapters.put("x", to_bytes(base.adapter(1)))
        got = await second.generate("abc", adapter="x", **OPTIONS)
        assert got == await first.generate("abc", adapter="x@1", **OPTIONS)
        await second.adapters.put("x", to_bytes(base.adapter(2)), replace=True)
        assert (await first.adapters.get("x")).version == 2
        assert (await first.info()).num_adapters == 1
    await one.stop(drain_s=0)
    await two.stop(drain_s=0)
    last = await start_server(registry=place)
    assert (await last.registry.resolve("x")).digest == base.adapter(2).digest
