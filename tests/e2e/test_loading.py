"""What callers and operators meet while a server loads its model."""

import asyncio
import socket
import threading

import pytest
import trustme

import redmux_server.app
from redmux import (
    AsyncClient,
    FailedPreconditionError,
    InvalidArgumentError,
    UnauthenticatedError,
    UnavailableError,
)
from redmux_server.app import Server
from redmux_server.config import ServerConfig
from redmux_server.doors import Doors
from redmux_server.grpc_api import loading


@pytest.fixture
def held_load(monkeypatch):
    """Lets no model be loaded before this event is set."""
    is_free = threading.Event()
    load = redmux_server.app.load

    def held(config, choices):
        assert is_free.wait(60)
        return load(config, choices)

    monkeypatch.setattr(redmux_server.app, "load", held)
    yield is_free
    is_free.set()


@pytest.fixture
def refusals(monkeypatch):
    """Gets an entry for every call that is refused because of the loading."""
    refused = asyncio.Queue()
    refuse = loading._refuse

    def noting(requests, context):
        refused.put_nowait(context)
        return refuse(requests, context)

    monkeypatch.setattr(loading, "_refuse", noting)
    return refused


async def test_a_call_that_comes_while_the_model_loads_is_answered_once_it_is_there(
    tiny_folder, held_load, refusals
):
    config = ServerConfig(model=str(tiny_folder), port=0, http_port=0, metrics_port=0, threads=2)
    doors = await Doors.open(config)
    starting = asyncio.create_task(Server.start(config, doors))
    async with AsyncClient(f"127.0.0.1:{doors.port}") as client:
        assert await client.health() == "not_serving"
        asked = asyncio.create_task(client.info())
        early = asyncio.create_task(read(client.stream("abc", max_tokens=3, ignore_eos=True)))
        waiting = asyncio.create_task(client.wait_ready())
        await refusals.get()
        await refusals.get()
        held_load.set()
        server = await starting
        await waiting
        assert (await asked).model == str(tiny_folder)
        assert sum(len(chunk.token_ids) for chunk in await early) == 3
        assert await client.health() == "serving"
    await server.stop(drain_s=0)


async def read(stream):
    return [chunk async for chunk in stream]


async def test_who_has_no_key_learns_nothing_of_the_loading():
    config = ServerConfig(port=0, http_port=0, metrics_port=0, api_keys=("the-only-key",))
    doors = await Doors.open(config)
    address = f"127.0.0.1:{doors.port}"
    async with AsyncClient(address) as stranger, AsyncClient(address, api_key="the-only-key") as us:
        with pytest.raises(UnauthenticatedError):
            await stranger.info()
        with pytest.raises(UnavailableError, match="loading"):
            await us.info()
    await doors.close()


@pytest.mark.parametrize("option", ["port", "http_port", "metrics_port"])
async def test_a_port_that_is_taken_is_found_before_anything_is_loaded(option, monkeypatch):
    monkeypatch.setattr(redmux_server.app, "load", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports = {"port": 0, "http_port": 0, "metrics_port": 0} | {option: taken.getsockname()[1]}
        with pytest.raises(FailedPreconditionError, match=str(ports[option])):
            await Server.start(ServerConfig(model="/nowhere", **ports))


@pytest.mark.parametrize("host", ["::1", "[::1]"])
async def test_an_address_of_ipv6_needs_no_brackets(host):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    doors = await Doors.open(ServerConfig(host=host, port=0, metrics_port=0))
    async with AsyncClient(f"[::1]:{doors.port}") as client:
        assert await client.health() == "not_serving"
    await doors.close()


@pytest.mark.parametrize("which", ["no PEM", "another's key", "missing", "swapped"])
async def test_a_certificate_that_cannot_be_used_is_told_as_such(which, tmp_path):
    for name in ("ours", "theirs"):
        issued = trustme.CA().issue_cert("inference.example")
        issued.private_key_pem.write_to_path(tmp_path / f"{name}.key")
        issued.cert_chain_pems[0].write_to_path(tmp_path / f"{name}.pem")
    (tmp_path / "garbage").write_text("garbage")
    cert, key = {
        "no PEM": ("garbage", "ours.key"), "another's key": ("ours.pem", "theirs.key"),
        "missing": ("nowhere", "ours.key"), "swapped": ("ours.key", "ours.pem"),
    }[which]  # fmt: skip
    config = ServerConfig(
        port=0, metrics_port=0, tls_cert=str(tmp_path / cert), tls_key=str(tmp_path / key)
    )
    with pytest.raises(InvalidArgumentError, match=r"tls_cert .* and tls_key"):
        await Doors.open(config)


async def test_a_start_that_fails_frees_its_ports(tiny_folder, held_load):
    held_load.set()
    config = ServerConfig(
        model=str(tiny_folder), port=0, http_port=0, metrics_port=0, adapters=("/nowhere",)
    )
    doors = await Doors.open(config)
    with pytest.raises(Exception, match="/nowhere"):
        await Server.start(config, doors)
    for port in (doors.port, doors.http_port, doors.metrics_port):
        socket.create_server(("127.0.0.1", port)).close()
