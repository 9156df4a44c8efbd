"""The page at /, used as people use it."""

import json

import httpx2
import pytest

from redmux_adapters import to_bytes

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


async def test_the_page_shows_the_base_and_all_adapters(page, names):
    pills = page.locator(".pill .name")
    await expect(pills).to_have_text(["tiny", *names])
    await expect(page.locator("#base")).to_have_text("tiny")
    await expect(page.locator("#running")).to_have_text("0")
    assert await page.title() == "redmux playground"
    await page.click("#all")
    await expect(page.locator(".pill input:checked")).to_have_count(1 + len(names))


async def test_answers_stream_side_by_side_from_one_batch(page, server, names, steps):
    all_names = ["tiny", *names]
    await ask(page, *all_names, max_tokens=40)
    steps.allow(12)
    await expect(page.locator("[data-state=streaming]")).to_have_count(len(all_names))
    await expect(page.locator("#running")).to_have_text(str(len(all_names)))
    await expect(page.locator("#distinct")).to_have_text(str(len(names)))
    await expect(page.locator("#rows .is-row")).to_have_count(len(names))
    await expect(page.locator("#rows .is-base")).to_have_count(1)
    assert await page.locator("#send").is_disabled()
    begun = {name: await text_of(page, name) for name in all_names}
    steps.free()
    await all_ended(page)
    for name in all_names:
        text = await text_of(page, name)
        assert text == await of_chat(server, name, max_tokens=40)
        assert text.startswith(begun[name])
        assert len(text) > len(begun[name])
    await expect(page.locator("#said")).to_have_text(f"{len(all_names)} complete.")
    assert any(begun.values())
    boxes = [await answer(page, name).bounding_box() for name in all_names[:2]]
    assert boxes[0]["y"] == boxes[1]["y"]
    assert boxes[0]["x"] < boxes[1]["x"]


async def test_a_system_prompt_and_sampling_reach_the_server(page, server, names):
    await page.fill("#system", "Be brief")
    fields = {
        "temperature": 0.9, "top_p": 0.95, "top_k": 40, "min_p": 0.01, "seed": 7,
        "presence_penalty": 0.5, "frequency_penalty": -0.5, "repetition_penalty": 1.2,
    }  # fmt: skip
    await ask(page, names[0], **fields)
    await all_ended(page)
    messages = [
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": "Hello"},
    ]
    whole = await of_api(
        server, "/v1/chat/completions", model=names[0], messages=messages, max_tokens=24, **fields
    )
    assert await text_of(page, names[0]) == whole["choices"][0]["message"]["content"]


async def test_a_stop_text_ends_an_answer_and_is_named(page, server):
    whole = await of_chat(server, "tiny", max_tokens=24)
    stop = next(char for char in whole[2:] if char.isalnum())
    await ask(page, "tiny", stop=f"\\n{stop}\n{stop}")
    await all_ended(page)
    assert await text_of(page, "tiny") == whole[: whole.index(stop)]
    assert (
        await answer(page, "tiny").locator(".state").inner_text()
        == f"stopped at {json.dumps(stop)}"
    )


async def test_plain_prompts_are_continued(page, server, names):
    await page.get_by_text("Plain", exact=True).click()
    await expect(page.locator("#system")).to_be_hidden()
    await ask(page, "tiny", names[1])
    await all_ended(page)
    for name in ("tiny", names[1]):
        whole = await of_api(
            server, "/v1/completions", model=name, prompt="Hello", max_tokens=24, **DRAWN
        )
        assert await text_of(page, name) == whole["choices"][0]["text"]


async def test_one_answer_is_stopped_and_the_others_go_on(page, server, names, steps, until):
    await ask(page, "tiny", *names[:2], max_tokens=60)
    steps.allow(10)
    await expect(page.locator("[data-state=streaming]")).to_have_count(3)
    await page.get_by_role("button", name=f"Stop {names[0]}").click()
    await expect(answer(page, names[0])).to_have_attribute("data-state", "stopped")
    cut = await text_of(page, names[0])
    steps.allow(3)
    await until(lambda: server.engine.num_open == 2)
    steps.free()
    await all_ended(page)
    assert await text_of(page, names[0]) == cut
    for name in ("tiny", names[1]):
        assert await text_of(page, name) == await of_chat(server, name, max_tokens=60)
    await expect(page.locator("#said")).to_have_text("2 complete, 1 stopped.")


@pytest.mark.parametrize("way", ["button", "key"])
async def test_all_answers_are_stopped_at_once(page, server, names, steps, until, way):
    await ask(page, "tiny", *names, max_tokens=200)
    steps.allow(8)
    await expect(page.locator("[data-state=streaming]")).to_have_count(7)
    await (page.click("#stop-all") if way == "button" else page.keyboard.press("Escape"))
    await expect(page.locator("[data-state=stopped]")).to_have_count(7)
    await expect(page.locator("#said")).to_have_text("7 stopped.")
    steps.allow(5)
    await until(lambda: server.engine.num_open == 0)


async def test_a_refused_field_is_marked_until_it_is_right(page):
    await ask(page, "tiny", top_p=3)
    await all_ended(page)
    message = "top_p is 3.0, must be above 0 and at most 1"
    await expect(answer(page, "tiny").get_by_role("alert")).to_have_text(message)
    await expect(page.locator("[name=top_p]")).to_have_attribute("aria-invalid", "true")
    await expect(page.locator(".wrong")).to_have_text(message)
    await ask(page, "tiny", top_p=0.9)
    await all_ended(page)
    await expect(page.locator("[aria-invalid]")).to_have_count(0)
    await expect(page.locator("[data-state=done]")).to_have_count(1)


async def test_an_error_stays_with_the_adapter_that_has_it(page, server, base, names):
    await server.registry.put("gone", to_bytes(base.adapter(77)), "", False, "")
    await page.reload()
    await page.get_by_role("checkbox", name="gone").wait_for(state="attached")
    await server.registry.delete("gone", "")
    await ask(page, "gone", names[0])
    await all_ended(page)
    assert "gone" in await answer(page, "gone").get_by_role("alert").inner_text()
    await expect(answer(page, names[0])).to_have_attribute("data-state", "done")
    await expect(page.locator("#said")).to_have_text("1 complete, 1 failed.")


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


async def test_tokens_tell_their_probabilities_under_the_pointer_and_by_arrows(page, server):
    await ask(page, "tiny", max_tokens=12)
    await all_ended(page)
    whole = await of_api(
        server, "/v1/chat/completions", model="tiny", max_tokens=12, logprobs=True,
        top_logprobs=5, **DRAWN, messages=[{"role": "user", "content": "Hello"}],
    )  # fmt: skip
    told = whole["choices"][0]["logprobs"]["content"]
    tip = page.get_by_role("tooltip")
    await expect(tip).to_be_hidden()
    await answer(page, "tiny").locator(".t").nth(0).hover()
    await expect(tip).to_be_visible()
    await expect(tip.locator("li")).to_have_count(5)
    logprob = await tip.locator("small").first.inner_text()
    assert float(logprob.removeprefix("log p ").replace("\u2212", "-")) == round(
        told[0]["logprob"], 3
    )
    await page.mouse.move(1, 1)
    await expect(tip).to_be_hidden()
    await answer(page, "tiny").locator(".text").focus()
    await page.keyboard.press("ArrowRight")
    await page.keyboard.press("ArrowRight")
    await expect(answer(page, "tiny").locator(".t.is-current")).to_have_count(1)
    await expect(tip).to_be_visible()
    box, view = await tip.bounding_box(), page.viewport_size
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= view["width"]
    await page.check("#tint")
    tints = (
        await answer(page, "tiny")
        .locator(".t")
        .evaluate_all("spans => spans.map(span => getComputedStyle(span).backgroundColor)")
    )
    assert len(set(tints)) > 1


async def test_without_log_probabilities_none_are_asked_for(page):
    await page.uncheck("#logprobs")
    async with page.expect_request("**/v1/side_by_side") as sent:
        await ask(page, "tiny")
    assert "logprobs" not in (await sent.value).post_data_json["request"]
    await all_ended(page)
    await expect(page.locator(".t")).to_have_count(0)
    assert await text_of(page, "tiny")


def chunk(text, *tokens, reason=None):
    content = [
        {"token": token, "bytes": [], "logprob": -0.5, "top_logprobs": []} for token in tokens
    ]
    choice = {"index": 0, "delta": {"content": text}, "logprobs": {"content": content},
              "finish_reason": reason}  # fmt: skip
    told = {"first_token_s": 0.1, "total_s": 0.2}
    return f"event: 0\ndata: {json.dumps({'choices': [choice], 'redmux': told})}\n\n"


async def answered(page, *chunks):
    """Asks, where the answer of the server is replaced."""
    body = "".join(chunks)
    await page.route("**/v1/side_by_side", lambda route: route.fulfill(
        body=body, content_type="text/event-stream"))  # fmt: skip
    await ask(page, "tiny")
    await all_ended(page)


async def test_what_a_model_writes_is_never_html(page):
    text = "<img src=x onerror=alert(1)><script>alert(2)</script>&amp;"
    await answered(page, chunk(text, text), chunk("", reason="stop"), "event: 0\ndata: [DONE]\n\n")
    assert await text_of(page, "tiny") == text
    assert await page.locator(".text img, .text script").count() == 0
    await page.locator(".t").hover()
    await expect(page.get_by_role("tooltip")).to_contain_text("<img")
    assert await page.locator(".tip img").count() == 0


async def test_parts_of_the_text_belong_to_their_tokens(page):
    await answered(
        page,
        chunk("a", "a"), chunk("", "\ufffd", "\ufffd"), chunk("\U0001f600 b", "\ufffd", " b"),
        chunk("", "c"), chunk("cd", "d", "STOP"), chunk("", reason="stop"),
        "event: 0\ndata: [DONE]\n\n",
    )  # fmt: skip
    await expect(page.locator(".t")).to_have_text(["a", "\U0001f600", " b", "c", "d"])
    await page.locator(".t").nth(1).hover()
    await expect(page.locator(".tip .chosen")).to_have_count(3)


async def test_a_stream_that_breaks_off_is_told(page):
    await answered(page, chunk("abc", "abc"))
    await expect(answer(page, "tiny").get_by_role("alert")).to_have_text("the stream ended early")
    assert await text_of(page, "tiny") == "abc"


async def test_a_server_that_is_gone_is_told(server, names, open_page):
    async with open_page(server, may_fail=("502", "ERR_FAILED")) as page:
        await page.wait_for_selector(".pill")
        await page.route("**/v1/**", lambda route: route.fulfill(status=502, body="<html>"))
        await ask(page, "tiny")
        await all_ended(page)
        await expect(answer(page, "tiny").get_by_role("alert")).to_have_text(
            "the server answered 502"
        )
        await page.unroute_all()
        await page.route("**/v1/side_by_side", lambda route: route.abort())
        await ask(page, "tiny")
        await all_ended(page)
        await expect(answer(page, "tiny").get_by_role("alert")).to_contain_text("not reached")


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
