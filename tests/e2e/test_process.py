"""A real `redmux serve` process: start, signals, configuration, kill -9."""

import asyncio
import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import trustme
from serve_process import Process

from redmux import AsyncClient, UnauthenticatedError, UnavailableError
from redmux_adapters import to_bytes
from redmux_server.registry.folder_lock import FolderLock

DOCKERFILE = Path(__file__).parents[2] / "Dockerfile"


@pytest.fixture
def serve(tiny_folder):
    return lambda *flags, **environ: Process("--model", str(tiny_folder), *flags, **environ)


async def test_sigterm_lets_running_streams_end_and_takes_no_more(serve):
    async with serve() as server:
        target = await server.ready()
        async with AsyncClient(target) as client, AsyncClient(target) as late:
            await late.info()
            stream = client.stream("abc", max_tokens=250, ignore_eos=True)
            first = await anext(stream)
            server.process.send_signal(signal.SIGTERM)
            with pytest.raises(UnavailableError):
                await keep_asking(late)
            rest = [chunk async for chunk in stream]
        assert len(first.token_ids) + sum(len(c.token_ids) for c in rest) == 250
        assert rest[-1].finish_reason == "length"
        code, text = await server.ended()
    assert code == 0
    assert "draining" in text
    assert text.splitlines()[-1].endswith("redmux_server.app: stopped")


async def keep_asking(client):
    while True:
        await client.generate("abc", max_tokens=1, timeout_s=5)


async def test_a_second_signal_cuts_the_draining_short(serve):
    async with serve() as server:
        target = await server.ready()
        async with AsyncClient(target) as client:
            streams = [client.stream("abc", max_tokens=250, ignore_eos=True) for _ in range(60)]
            await asyncio.gather(*(anext(s) for s in streams))
            server.process.send_signal(signal.SIGINT)
            server.process.send_signal(signal.SIGTERM)
            server.process.send_signal(signal.SIGTERM)
            results = await asyncio.gather(*(finish(s) for s in streams))
        code, _ = await server.ended()
    assert code == 0
    assert any(isinstance(r, UnavailableError) for r in results)


async def finish(stream):
    try:
        async for _ in stream:
            pass
    except UnavailableError as err:
        return err
    return None


async def test_an_acknowledged_adapter_survives_kill_9(serve, base, tmp_path):
    folder = str(tmp_path / "adapters")
    adapter, other = base.adapter(1), base.adapter(2)
    async with serve("--data-dir", folder) as server:
        async with AsyncClient(await server.ready()) as client:
            await client.adapters.put("acme/x", to_bytes(adapter))
            await client.adapters.put("gone", to_bytes(other))
            await client.adapters.delete("gone")
        server.process.kill()
        await server.process.wait()
    async with (
        serve(REDMUX_DATA_DIR=folder) as server,
        AsyncClient(await server.ready()) as client,
    ):
        kept = [(a.name, a.digest) async for a in client.adapters.list()]
    assert kept == [("acme/x", adapter.digest)]


async def test_two_servers_on_one_data_folder_are_one_too_many(serve, base, tmp_path):
    folder = str(tmp_path)
    async with serve("--data-dir", folder) as first:
        target = await first.ready()
        async with serve("--data-dir", folder) as second:
            code, text = await second.ended()
        assert code == 1
        assert f"(pid {first.process.pid} on " in text.splitlines()[-1]
        async with AsyncClient(target) as client:
            await client.adapters.put("x", to_bytes(base.adapter(1)))


async def test_adapters_are_loaded_from_folders_and_files_at_start(serve, base, tmp_path):
    from redmux_adapters import write_folder

    write_folder(base.adapter(1), tmp_path / "many" / "one")
    write_folder(base.adapter(2), tmp_path / "many" / "two")
    (tmp_path / "three.safetensors").write_bytes(to_bytes(base.adapter(3)))
    flags = ("--adapters", str(tmp_path / "many"), "--adapters",
             f"acme/x={tmp_path / 'three.safetensors'}")  # fmt: skip
    async with serve(*flags) as server, AsyncClient(await server.ready()) as client:
        names = {a.name: a.digest async for a in client.adapters.list()}
    assert names == {
        "one": base.adapter(1).digest, "two": base.adapter(2).digest,
        "acme/x": base.adapter(3).digest,
    }  # fmt: skip


# Its thread that loads never comes back.
ENDLESS = """
import sys, threading
from redmux_server.registry import given

given.read_given = lambda adapters: threading.Event().wait()
from redmux.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def serve_endless(serve):
    """Starts servers that load for ever."""
    return lambda *flags: serve(*flags, start=("-c", ENDLESS))


async def test_a_start_says_what_it_does_before_anything_is_loaded(serve_endless):
    async with serve_endless() as server:
        target = await server.tells(r"listening on [^ ]+:(\d+), .*NOT_SERVING until")
        async with AsyncClient(target) as client:
            assert await client.health() == "not_serving"
            with pytest.raises(UnavailableError, match="loading its model; try again"):
                await client.info()
    assert "starts with model" in server.lines[0]


@pytest.mark.parametrize("line", ["starts with model", ": loading "])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_a_start_at_once(serve_endless, number, line):
    async with serve_endless() as server:
        await server.tells(line)
        server.process.send_signal(number)
        code, text = await server.ended()
    assert code == 0
    assert "stopped while loading" in text


async def test_a_signal_that_comes_while_the_interpreter_imports_is_heard(serve):
    """By default the first process of a container would not hear it."""
    async with serve() as server:
        await server.tells("listening")
        server.process.send_signal(signal.SIGTERM)
        code, text = await server.ended()
    assert code == 0
    assert "stopped while loading" in text


# Gets SIGTERM in the very moment in which the start is done.
AT_THE_END = """
import os, signal, sys, threading
from redmux_server import app

serve, heard = app.Server._serve, threading.Event()

class Leaving(app.Leaving):
    def __init__(self, drain_s, on_signal, on_hangup):
        super().__init__(drain_s, lambda: (on_signal(), heard.set()), on_hangup)

async def signalled(self):
    await serve(self)
    os.kill(os.getpid(), signal.SIGTERM)
    assert heard.wait(60)

app.Leaving, app.Server._serve = Leaving, signalled
from redmux.cli import main
sys.exit(main(sys.argv[1:]))
"""


async def test_a_signal_that_comes_with_the_end_of_the_start_is_not_lost(tiny_folder):
    flags = ("--model", str(tiny_folder), "--drain-s", "0")
    async with Process(*flags, start=("-c", AT_THE_END)) as server:
        code, text = await server.ended()
    assert code == 0
    assert "draining" in text


async def test_sighup_reads_the_keys_again_and_a_bad_file_changes_nothing(serve, tmp_path):
    path = tmp_path / "keys"
    path.write_text("the-first-key\n")
    async with serve("--api-keys-file", str(path)) as server:
        target = await server.ready()
        old = AsyncClient(target, api_key="the-first-key")
        new = AsyncClient(target, api_key="the-second-key")
        async with old, new:
            await old.info()
            with pytest.raises(UnauthenticatedError):
                await new.info()
            path.write_text("the-second-key\n")
            server.process.send_signal(signal.SIGHUP)
            await server.tells("keys read again: 1")
            await new.info()
            with pytest.raises(UnauthenticatedError):
                await old.info()
            path.write_text("")
            server.process.send_signal(signal.SIGHUP)
            await server.tells("keys stay as they are.*holds no key")
            await new.info()


# Gets SIGHUP and SIGTERM when its event loop has been closed.
AFTER_THE_END = """
import asyncio, os, signal, sys
from redmux_server import cli

run = asyncio.run

def signalled(main):
    try:
        return run(main)
    finally:
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGTERM)

asyncio.run = signalled
from redmux.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
async def test_signals_that_come_when_all_is_over_do_not_change_how_it_ended(tiny_folder, tmp_path):
    path = tmp_path / "keys"
    path.write_text("the-first-key\n")
    flags = ("--model", str(tiny_folder), "--api-keys-file", str(path))
    async with Process(*flags, start=("-c", AFTER_THE_END)) as server:
        await server.ready()
        server.process.send_signal(signal.SIGTERM)
        code, text = await server.ended()
    assert code == 0
    assert "Exception" not in text


async def test_sighup_reads_the_keys_while_the_server_loads(serve_endless, tmp_path):
    path = tmp_path / "keys"
    path.write_text("the-first-key\n")
    async with serve_endless("--api-keys-file", str(path)) as server:
        for when in ("listening", "loading"):
            await server.tells(when)
            server.process.send_signal(signal.SIGHUP)
            await server.tells("keys read again: 1")


async def test_the_images_health_check_needs_neither_port_nor_certificate(serve, tmp_path):
    text = DOCKERFILE.read_text().replace("/dev/shm", str(tmp_path))
    environ = dict(re.findall(r"^ +(REDMUX_(?!ADAPTERS)\w+)=(\S+)", text, re.M))
    assert environ["REDMUX_HOST"] == "0.0.0.0"
    check = [sys.executable, "-m", *json.loads(re.search(r"HEALTHCHECK .* CMD (\[.*\])", text)[1])]
    certificate = trustme.CA().issue_cert("inference.example")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    flags = ("--tls-cert", str(tmp_path / "cert.pem"), "--tls-key", str(tmp_path / "key.pem"),
             "--api-keys", "a-key-of-tenants")  # fmt: skip
    async with serve(*flags, **environ) as server:
        await server.ready()
        assert await answer_to(check) == (0, "serving\n")
    assert (await answer_to(check))[0] == 3  # no server; a check fails by any number but 0


async def answer_to(command):
    process = await asyncio.create_subprocess_exec(
        *command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    out, _ = await process.communicate()
    return process.returncode, out.decode()


CASES = {
    "device": (["--device", "cuda"], "CUDA"),
    "context": (["--max-context", "99999"], "max_context is 99999"),
    "adapter": (["--adapters", "nowhere"], "nowhere"),
    "base": (["--adapters", "{tmp}/stranger"], "other-1x1-00"),
    "cut adapter": (["--adapters", "{tmp}/cut.safetensors"], "{tmp}/cut.safetensors: the tensors"),
    "folder in use": (["--data-dir", "{tmp}/held"], "{tmp}/held belongs to another server"),
    "registry": (["--data-dir", "{tmp}/lost"], "{tmp}/lost/registry.db is empty; restore it"),
    "registry's url": (["--registry", "x.db"], "registry has to be a URL like postgresql"),
    "adapter folder": (["--adapter-dir", "{tmp}/none"], "there is no folder {tmp}/none; make it"),
    "port": (["--port", "{port}"], "cannot listen on 127.0.0.1:{port}; is it taken by another"),
    "http": (["--http-port", "{port}"], "cannot serve HTTP"),
    "metrics": (["--metrics-port", "{port}"], "cannot serve metrics"),
    "threads": (["--threads", "many"], "--threads is 'many'"),
    "cache": (["--kv-cache-tokens", "32"], "kv_cache_tokens is too small"),
    "cache beyond the memory": (
        ["--kv-cache-tokens", "99999999999"],
        "kv_cache_tokens is 99999999999, which takes",
    ),
    "model": (["--model", "{tmp}/no.gguf"], "no.gguf"),
    "model folder": (["--model", "{tmp}/none"], "'{tmp}/none': there is no such folder"),
    "model folder beside": (["--model", "./none"], "'./none': there is no such folder"),
    "model file": (["--model", "{tmp}/cut.safetensors"], "it is a file; give a folder"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_start_up_error_is_one_line_and_exit_1(case, base, tiny_folder, tmp_path, capsys):
    from redmux_adapters import Adapter, write_folder
    from redmux_server.cli import serve

    flags, message = CASES[case]
    stranger = Adapter(base_fingerprint="other-1x1-00", edits=base.adapter(1).edits)
    write_folder(stranger, tmp_path / "stranger")
    (tmp_path / "cut.safetensors").write_bytes(to_bytes(base.adapter(1))[:-1])
    lock = FolderLock(tmp_path / "held")
    (tmp_path / "lost").mkdir()
    (tmp_path / "lost" / "registry.db").touch()
    with socket.create_server(("127.0.0.1", 0)) as taken, contextlib.closing(lock):
        port = taken.getsockname()[1]
        flags = [flag.format(tmp=tmp_path, port=port) for flag in flags]
        common = [
            "--port",
            "0",
            "--http-port",
            "0",
            "--metrics-port",
            "0",
            "--model",
            str(tiny_folder),
        ]
        assert serve([*common, *flags]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("redmux serve: ")
    assert message.format(tmp=tmp_path, port=port) in last


async def test_a_mistake_in_the_environment_ends_a_process_before_it_loads_anything(serve):
    async with serve(REDMUX_THREADS="many") as server:
        code, text = await server.ended()
    assert code == 1
    assert text == "redmux serve: REDMUX_THREADS is 'many', must be a number (int)\n"


@pytest.mark.slow
async def test_garbage_is_collected_once_it_serves_and_not_before(serve, tmp_path):
    """A start makes half a million objects that stay; looking through them would take a second."""
    (tmp_path / "sitecustomize.py").write_text(
        "import gc, sys\n"
        "def tell(phase, info):\n"
        "    print(phase, info['generation'], 'torch' in sys.modules, file=sys.stderr)\n"
        "gc.callbacks.append(tell)\n"
    )
    async with serve(PYTHONPATH=str(tmp_path)) as server:
        target = await server.ready()
        async with AsyncClient(target) as client:
            await asyncio.gather(*(client.generate("abc", max_tokens=8) for _ in range(100)))
        server.process.send_signal(signal.SIGTERM)
        _, text = await server.ended()
    starting = "".join(server.lines)
    assert "start 0 False" in starting
    assert "start 0 True" not in starting
    assert "start 0 True" in text.removeprefix(starting)
