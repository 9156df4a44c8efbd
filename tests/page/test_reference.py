"""The page at /docs: what is served, found by keyboard, light and dark, on a phone."""

import httpx2
import pytest_asyncio
from page_use import expect


@pytest_asyncio.fixture(loop_scope="module")
async def document(server):
    async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{server.http_port}") as http:
        return (await http.get("/openapi.json")).json()


async def test_every_call_is_there_with_its_fields(server, open_page, document):
    async with open_page(server, path="docs") as page:
        assert await page.title() == "redmux API"
        calls = [
            f"{method.upper()} {path}"
            for path, operations in document["paths"].items() for method in operations
        ]  # fmt: skip
        links = await page.locator("nav a").all_inner_texts()
        assert sorted(links) == sorted(calls)
        chat = page.locator("#post-v1-chat-completions")
        await expect(chat).to_be_hidden()
        await page.get_by_role("link", name="POST /v1/chat/completions").click()
        await expect(chat).to_be_visible()
        for name in document["components"]["schemas"]["ChatBody"]["properties"]:
            await expect(chat.locator("th").get_by_text(name, exact=True)).to_be_visible()
        await expect(chat.locator("th b")).to_have_text(["model", "messages"])
        await chat.get_by_role("link", name="ResponseFormat").click()
        await expect(page.locator("#type-ResponseFormat")).to_contain_text("json_schema")
        await page.get_by_role("link", name="Playground").click()
        await expect(page.locator("#send")).to_be_visible()


async def test_no_link_leads_nowhere(server, open_page):
    async with open_page(server, path="docs") as page:
        lost = await page.locator("a[href^='#']").evaluate_all(
            "all => all.map(a => a.getAttribute('href').slice(1))"
            ".filter(place => !document.getElementById(place))"
        )
        assert lost == []
        twice = await page.evaluate(
            "[...document.querySelectorAll('[id]')].map(e => e.id)"
            ".filter((id, i, all) => all.indexOf(id) != i)"
        )
        assert twice == []


async def test_all_of_it_is_used_by_the_keyboard(server, open_page):
    async with open_page(server, path="docs") as page:
        await page.keyboard.press("Tab")
        await expect(page.get_by_role("link", name="Skip to the paths")).to_be_focused()
        await page.keyboard.press("Enter")
        await page.keyboard.press("Tab")
        first = page.locator("#paths summary").first
        await expect(first).to_be_focused()
        assert await first.evaluate("node => getComputedStyle(node).outlineStyle") == "solid"
        await page.keyboard.press("Enter")
        await expect(page.locator("#post-v1-completions")).to_be_visible()
        await page.keyboard.press("Enter")
        await expect(page.locator("#post-v1-completions")).to_be_hidden()


async def test_it_is_light_or_dark_as_the_system_is_and_fits_a_phone(server, open_page):
    ink = "getComputedStyle(document.body).backgroundColor"
    phone = {"viewport": {"width": 360, "height": 740}, "color_scheme": "dark"}
    async with open_page(server, path="docs#put-v1-adapters--name-", **phone) as page:
        await expect(page.locator("#put-v1-adapters--name-")).to_be_visible()
        dark = await page.evaluate(ink)
        await page.emulate_media(color_scheme="light")
        assert await page.evaluate(ink) != dark
        await page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
        assert await page.evaluate("document.documentElement.scrollWidth") <= 360
