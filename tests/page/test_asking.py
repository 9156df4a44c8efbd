"""Answers on the page: streams, stops, errors, tokens."""

import json

import pytest
from page_use import DRAWN, all_ended, answer, ask, expect, of_api, of_chat, text_of

from redmux_adapters import to_bytes


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
    await until(lambda: len(steps.ended) == 1)
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
    await until(lambda: len(steps.ended) == 7)
    steps.allow(1)
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
