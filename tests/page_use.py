"""How tests use the page: what they ask, and what they find in it."""

import httpx2
import pytest

expect = pytest.importorskip("playwright.async_api").expect
DRAWN = {"temperature": 1, "seed": 3}  # answers of many different tokens
BUSY = "[data-state=waiting], [data-state=streaming]"


async def choose(page, *names):
    """Chooses these and no others."""
    await page.click("#none")
    for name in names:
        await page.get_by_role("checkbox", name=name, exact=True).check(force=True)


async def ask(page, *names, prompt="Hello", **fields):
    await choose(page, *names)
    for name, value in {"max_tokens": 24, **DRAWN, **fields}.items():
        await page.fill(f"[name={name}]", str(value))
    await page.fill("#prompt", prompt)
    await page.press("#prompt", "Control+Enter")


async def all_ended(page):
    await expect(page.locator("#send")).to_be_enabled()
    await expect(page.locator(BUSY)).to_have_count(0)


def answer(page, name):
    return page.get_by_role("article", name=f"Answer of {name}", exact=True)


async def text_of(page, name):
    return await answer(page, name).locator(".text").evaluate("node => node.textContent")


async def of_api(server, path, **body):
    async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{server.http_port}") as http:
        return (await http.post(path, json=body)).json()


async def of_chat(server, name, **body):
    asked = [{"role": "user", "content": "Hello"}]
    whole = await of_api(
        server, "/v1/chat/completions", model=name, messages=asked, **DRAWN, **body
    )
    return whole["choices"][0]["message"]["content"]
