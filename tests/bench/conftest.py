import asyncio
import json

import pytest

from redmux_bench.cli import main
from redmux_bench.server_process import ServerProcess


@pytest.fixture(scope="session")
def serving(tiny_folder):
    """A server process of the tiny model that all end-to-end tests share."""
    with ServerProcess("--model", str(tiny_folder)) as process:
        yield process


@pytest.fixture
def bench(tmp_path, tiny_folder):
    """Runs a command and returns its exit code and what it wrote with --json."""

    def run(*arguments):
        file = tmp_path / "results.json"
        code = main([*arguments, "--model", str(tiny_folder), "--json", str(file)])
        return code, json.loads(file.read_text())

    return run


@pytest.fixture
def adapter_names(serving):
    """Asks the server which adapters it has."""

    async def names():
        async with serving.client() as client:
            return [adapter.name async for adapter in client.adapters.list()]

    return lambda: asyncio.run(names())
