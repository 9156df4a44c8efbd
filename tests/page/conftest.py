"""The page in a real browser, before a real server with a tiny model.

`make browser` installs Chromium where it is missing; without it these tests are skipped.
"""

import asyncio
import contextlib
import shutil

import pytest
import pytest_asyncio
from allowed_steps import Steps

from redmux import AsyncClient
from redmux_adapters import to_bytes

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


def pytest_collection_modifyitems(items):
    """Tests of the page share the loop of its server and browser."""
    for item in items:
        if "/tests/page/" not in str(item.path):
            continue
        item.add_marker(pytest.mark.asyncio(loop_scope="module"), append=False)
        if CHROMIUM is None:
            item.add_marker(pytest.mark.skip(reason="there is no Chromium; run make browser"))


@pytest.fixture(scope="module")
def start(tiny_folder):
    """Starts a server, which stops at the end of the block."""
    from redmux_server.app import Server
    from redmux_server.config import ServerConfig

    @contextlib.asynccontextmanager
    async def start(**options):
        config = ServerConfig(
            model=str(tiny_folder), port=0, http_port=0, metrics_port=0, threads=2, max_running=16,
            max_batch_tokens=48, max_queue=64, served_model_name=("tiny",), **options,
        )  # fmt: skip
        server = await Server.start(config)
        try:
            yield server
        finally:
            await server.stop(drain_s=0)

    return start


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(start):
    async with start() as server:
        yield server


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def names(server, base):
    """The adapters of the server; with the base more than a browser opens connections."""
    names = [f"team/{word}" for word in ("formal", "legal", "pirate", "poet", "terse", "zen")]
    async with AsyncClient(f"127.0.0.1:{server.port}") as client:
        for seed, name in enumerate(names):
            await client.adapters.put(name, to_bytes(base.adapter(seed, 0.5)))
    return names


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser():
    playwright = pytest.importorskip("playwright.async_api")
    async with playwright.async_playwright() as started:
        browser = await started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        await browser.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def open_page(browser):
    """Opens the page of a server; nothing may be logged as wrong, or asked of elsewhere."""

    @contextlib.asynccontextmanager
    async def open_page(server, may_fail=(), path="", **options):
        context = await browser.new_context(**options)
        page = await context.new_page()
        logged, asked = [], []
        page.on(
            "console",
            lambda message: message.type in ("error", "warning") and logged.append(message.text),
        )
        page.on("pageerror", lambda error: logged.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        url = f"http://127.0.0.1:{server.http_port}/"
        await page.goto(url + path)
        try:
            yield page
            assert all(address.startswith((url, "data:", "blob:")) for address in asked)
            # Chromium itself logs every answer that is an error; `may_fail` are parts of such.
            assert [text for text in logged if not any(part in text for part in may_fail)] == []
        finally:
            await context.close()

    return open_page


@pytest_asyncio.fixture(loop_scope="module")
async def page(server, names, open_page):
    """The page at the width of a desk."""
    async with open_page(server, viewport={"width": 1360, "height": 900}) as page:
        await page.wait_for_selector(".pill input:checked >> nth=0", state="attached")
        yield page


@pytest.fixture
def steps(server):
    """Steps of the engine that happen when they are allowed."""
    steps = Steps(server.engine)
    yield steps
    steps.free()


@pytest.fixture
def until():
    """Waits for what no event tells of."""

    async def until(condition):
        while not condition():
            await asyncio.sleep(0.005)

    return until
