"""Clients of the HTTP door: the openai package, and httpx2 beside it for what that never sends."""

import httpx2
import openai
import pytest


@pytest.fixture
async def api(server):
    """The asynchronous client of the openai package."""
    async with openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{server.http_port}/v1", api_key="none", max_retries=0
    ) as api:
        yield api


@pytest.fixture
async def http(server):
    """A plain client."""
    async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{server.http_port}") as http:
        yield http
