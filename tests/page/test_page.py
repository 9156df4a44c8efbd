"""The page at /: choosing, uploading, keys; keyboard, phone, light and dark."""

import json

from page_use import all_ended, answer, ask, expect, of_chat, text_of

from redmux_adapters import to_bytes


async def test_the_page_shows_the_base_and_all_adapters(page, names):
    pills = page.locator(".pill .name")
    await expect(pills).to_have_text(["tiny", *names])
    await expect(page.locator("#base")).to_have_text("tiny")
    await expect(page.locator("#running")).to_have_text("0")
    assert await page.title() == "redmux playground"
    await page.click("#all")
    await expect(page.locator(".pill input:checked")).to_have_count(1 + len(names))


async def test_what_is_missing_is_told_before_anything_is_sent(page):
    await ask(page, "tiny", prompt="")
    await expect(page.locator("#ask-error")).to_have_text("Write a prompt first.")
    await ask(page)
    await expect(page.locator("#models-error")).to_contain_text("at least one")
    await expect(page.locator("#ask-error")).to_be_hidden()
    await expect(page.locator("#answers > *")).to_have_count(0)


async def test_an_uploaded_adapter_answers_at_once(server, names, base, open_page, tmp_path):
    good, broken = tmp_path / "own.safetensors", tmp_path / "broken.safetensors"
    good.write_bytes(to_bytes(base.adapter(50)))
    broken.write_bytes(b"nothing")
    async with open_page(server, may_fail=("400", "409")) as page:
        await page.get_by_text("Upload an adapter").click()
        await page.click("#put")
        await expect(page.locator("#upload-error")).to_have_text("Choose a file first.")
        await page.set_input_files("#file", broken)
        await page.click("#put")
        await expect(page.locator("#upload-error")).to_contain_text("safetensors")
        await page.set_input_files("#file", good)
        await expect(page.locator("#name")).to_have_value("own")
        await page.fill("#name", names[0])
        await page.click("#put")
        await expect(page.locator("#upload-error")).to_contain_text(names[0])
        await page.fill("#name", "mine/own 1")
        await page.click("#put")
        await expect(page.locator("#upload-error")).to_contain_text("mine/own 1")
        await page.fill("#name", "mine/own-1")
        await page.press("#name", "Enter")
        await expect(page.locator("#upload-said")).to_contain_text("mine/own-1 is served")
        await expect(page.locator("#upload-error")).to_be_hidden()
        await expect(page.get_by_role("checkbox", name="mine/own-1")).to_be_checked()
        await ask(page, "mine/own-1")
        await all_ended(page)
        text = await text_of(page, "mine/own-1")
    assert text == await of_chat(server, base.adapter(50).digest, max_tokens=24)
    await server.registry.delete("mine/own-1", "")


async def test_everything_is_reached_by_the_keyboard_in_its_order(page, names):
    await page.evaluate("document.getElementById('upload').open = true")
    reached = []
    for _ in range(40):
        await page.keyboard.press("Tab")
        reached.append(await page.evaluate(
            "(({id, name, dataset, tagName}) => id || name || dataset.model || tagName)"
            "(document.activeElement)"
        ))  # fmt: skip
        if reached[-1] == "put":
            break
    order = [
        "A", "key", "theme", "all", "none", "tiny", *(f"tiny:{name}" for name in names), "mode",
        "system", "prompt", "send", "SUMMARY", "temperature", "max_tokens", "stop", "logprobs",
        "file", "name", "replace", "put",
    ]  # fmt: skip
    places = [reached.index(name) for name in order]
    assert places == sorted(places)
    outline = await page.locator("#put").evaluate("node => getComputedStyle(node).outlineStyle")
    assert outline == "solid"
    unnamed = await page.locator("input, textarea, button").evaluate_all(
        "all => all.filter(e => !(e.labels?.length || e.getAttribute('aria-label') || "
        "e.textContent.trim())).map(e => e.outerHTML)"
    )
    assert unnamed == []


async def test_a_phone_shows_one_answer_below_the_other(server, names, open_page):
    async with open_page(server, viewport={"width": 360, "height": 740}, has_touch=True) as page:
        await page.wait_for_selector(".pill")
        await page.get_by_text("Sampling").tap()
        await ask(page, "tiny", names[0])
        await all_ended(page)
        boxes = [await answer(page, name).bounding_box() for name in ("tiny", names[0])]
        assert boxes[0]["x"] == boxes[1]["x"]
        assert boxes[0]["y"] < boxes[1]["y"]
        await answer(page, "tiny").locator(".t").first.tap()
        await expect(page.get_by_role("tooltip")).to_be_visible()
        assert await page.evaluate("document.documentElement.scrollWidth") <= 360


async def test_light_and_dark_follow_the_system_until_somebody_chooses(server, open_page):
    dark_ink = "getComputedStyle(document.body).backgroundColor"
    async with open_page(server, color_scheme="dark") as page:
        await page.wait_for_selector(".pill")
        dark = await page.evaluate(dark_ink)
        await page.emulate_media(color_scheme="light")
        light = await page.evaluate(dark_ink)
        assert light != dark
        await page.get_by_role("button", name="Change to the dark theme").click()
        assert await page.evaluate(dark_ink) == dark
        await page.reload()
        await page.wait_for_selector(".pill")
        assert await page.evaluate(dark_ink) == dark
        await page.get_by_role("button", name="Change to the light theme").click()
        assert await page.evaluate(dark_ink) == light


async def test_a_key_is_asked_for_and_kept_for_this_tab_alone(start, open_page):
    key = "a-key-of-this-test"
    async with (
        start(api_keys=(key,)) as server,
        open_page(server, may_fail=("401",)) as page,
    ):
        await expect(page.locator("#key-error")).to_be_visible()
        await expect(page.locator("#key")).to_be_focused()
        await page.fill("#key", "wrong-key-of-this-test")
        await page.press("#key", "Tab")
        await expect(page.locator("#key-error")).to_be_visible()
        await page.fill("#key", key)
        await page.press("#key", "Tab")
        await expect(page.locator("#key-error")).to_be_hidden()
        await ask(page, "tiny")
        await all_ended(page)
        await expect(page.locator("[data-state=done]")).to_have_count(1)
        assert await page.evaluate("JSON.stringify(sessionStorage)") == json.dumps(
            {"redmux-key": key}, separators=(",", ":")
        )
        assert key not in await page.evaluate("JSON.stringify(localStorage) + document.cookie")
        other = await page.context.new_page()
        await other.goto(page.url)
        await expect(other.locator("#key")).to_have_value("")


async def test_many_adapters_are_found_by_a_filter(server, names, open_page):
    async with open_page(server) as page:
        await page.route("**/v1/models", lambda route: route.fulfill(json={"data": [
            {"id": "tiny", "parent": None, "root": "", "max_model_len": 1, "redmux": {}},
            *({"id": f"a/{i}", "parent": "tiny", "redmux": {}} for i in range(5000)),
        ]}))  # fmt: skip
        await page.reload()
        await expect(page.locator(".pill")).to_have_count(80)
        await expect(page.locator("#more")).to_contain_text("4921 more")
        await page.click("#all")
        await page.fill("#prompt", "Hello")
        await page.click("#send")
        await expect(page.locator("#models-error")).to_contain_text("at most 256")
        await page.click("#none")
        await page.fill("#filter", "4321")
        await expect(page.locator(".pill .name")).to_have_text(["a/4321"])
        await page.get_by_role("checkbox", name="a/4321").check(force=True)
        await expect(page.locator("#more")).to_have_text("1 of 5001 chosen")
