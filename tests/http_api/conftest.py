"""One server for each module, and its clients: the openai package, and httpx2 for what that lacks.

What a test puts there stays for the others of its module.
"""

import httpx2
import jsonschema
import openai
import pytest
import pytest_asyncio
from allowed_steps import Steps
from encoders import load_tiny_encoder, save_tiny_encoder

from redmux import AsyncClient
from redmux_adapters import to_bytes


def pytest_collection_modifyitems(items):
    """Tests of a module share the loop of its server, where they use that."""
    for item in items:
        names = set(getattr(item, "fixturenames", ()))
        if "/http_api/" in str(item.path) and names & {"server", "reader"}:
            item.add_marker(pytest.mark.asyncio(loop_scope="module"), append=False)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tiny_folder):
    from redmux_server.app import Server
    from redmux_server.config import ServerConfig

    config = ServerConfig(
        model=str(tiny_folder), port=0, http_port=0, metrics_port=0, threads=2, max_running=16,
        max_batch_tokens=48, max_queue=64, served_model_name=("tiny", "gpt-4o"),
        drafts="off",  # a token a step, so that an answer can be met on its way
    )  # fmt: skip
    server = await Server.start(config)
    yield server
    await server.stop(drain_s=0)


@pytest.fixture
def steps(server):
    """Steps of the engine that happen when they are allowed."""
    steps = Steps(server.engine)
    yield steps
    steps.free()


@pytest.fixture(scope="module")
def url(server):
    return f"http://127.0.0.1:{server.http_port}"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(server):
    async with AsyncClient(f"127.0.0.1:{server.port}") as client:
        yield client


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def api(url):
    """The asynchronous client of the openai package."""
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as api:
        yield api


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def http(url):
    """A plain client."""
    async with httpx2.AsyncClient(base_url=url, timeout=60) as http:
        yield http


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return load_tiny_encoder(save_tiny_encoder(tmp_path_factory.mktemp("bert"), "bert"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def reader(encoder):
    """A server of an encoder with adapters of several heads."""
    from redmux_server.app import Server
    from redmux_server.config import ServerConfig

    config = ServerConfig(
        model=str(encoder.folder), port=0, http_port=0, metrics_port=0, threads=1,
        served_model_name=("bert",),
    )  # fmt: skip
    server = await Server.start(config)
    async with AsyncClient(f"127.0.0.1:{server.port}") as client:
        await client.adapters.put("bare", to_bytes(encoder.adapter(1)))
        for name, labels, kind in (
            ("mood", ["bad", "good"], "single_label_classification"),
            ("topic", ["a", "b", "c"], "single_label_classification"),
            ("tags", ["x", "y"], "multi_label_classification"),
            ("rating", ["stars"], "regression"),
        ):
            adapter = encoder.adapter(2, "mean", labels=labels, problem_type=kind)
            await client.adapters.put(name, to_bytes(adapter))
        yield server, client
    await server.stop(drain_s=0)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def reading(reader):
    server, _ = reader
    url = f"http://127.0.0.1:{server.http_port}"
    async with httpx2.AsyncClient(base_url=url, timeout=60) as reading:
        yield reading


@pytest.fixture
def put(client):
    """Publishes an adapter object under a name."""

    async def put(name, adapter, **options):
        return await client.adapters.put(name, to_bytes(adapter), **options)

    return put


@pytest.fixture
def model(server):
    return "tiny"


@pytest.fixture
def fits():
    """Fails unless a response is one that the document of the door has."""

    def fits(document, operation, response):
        status = str(response.status_code)
        found = operation["responses"].get(status) or operation["responses"][f"{status[0]}XX"]
        schema = found["content"][response.headers["content-type"]]["schema"]
        jsonschema.validate(
            response.json(), {**schema, "components": document["components"]},
            cls=jsonschema.Draft202012Validator,
        )  # fmt: skip

    return fits
