"""/v1/completions through the openai package, beside the same requests over gRPC."""

import asyncio
import json

import openai
import pytest

from redmux_server.http_api.logprobs import CompletionLogprobs, TokenNames


async def test_a_completion_is_that_of_grpc(api, client, server, model):
    there = await client.generate("abc", max_tokens=8)
    here = await api.completions.create(model=model, prompt="abc", max_tokens=8)
    (choice,) = here.choices
    assert (choice.index, choice.text, choice.finish_reason) == (0, there.text, "length")
    assert here.object == "text_completion"
    assert here.usage.prompt_tokens == 3
    assert here.usage.completion_tokens == 8
    assert here.usage.total_tokens == 11
    assert here.system_fingerprint == server.model.fingerprint
    assert here.model == model


async def test_an_adapter_is_named_as_model_and_told_in_body_and_header(api, base, put, model):
    adapter = base.adapter(1)
    await put("team/pirate", adapter)
    plain = await api.completions.create(model=model, prompt="abc", max_tokens=8)
    assert plain.redmux["digest"] is None
    texts = set()
    for name in ("team/pirate", f"{model}:team/pirate", adapter.digest):
        raw = await api.completions.with_raw_response.create(model=name, prompt="abc", max_tokens=8)
        assert raw.headers["x-redmux-adapter"] == adapter.digest
        answer = raw.parse()
        assert answer.redmux["adapter"] == "team/pirate"
        assert answer.redmux["digest"] == adapter.digest
        texts.add(answer.choices[0].text)
    assert len(texts) == 1
    assert texts != {plain.choices[0].text}


async def test_all_prompts_of_a_request_are_of_the_version_that_was_found_for_it(
    api, base, put, server, monkeypatch
):
    """Others may be put meanwhile."""
    await put("changing", base.adapter(1))
    found, resolve = [], server.registry.resolve

    async def change(name, tenant=""):
        found.append(await resolve(name, tenant))
        await put("changing", base.adapter(len(found) + 1), replace=True)
        return found[-1]

    monkeypatch.setattr(server.registry, "resolve", change)
    answer = await api.completions.create(model="changing", prompt=["abc"] * 3, max_tokens=8)
    assert answer.redmux["digest"] == found[0].digest
    assert len({choice.text for choice in answer.choices}) == len(found) == 1


async def test_a_model_that_is_not_there_is_never_the_base(api, base, put, model):
    await put("pirate", base.adapter(1))
    for name in ("pirat", f"{model}:pirat", f"{model}:", "", "a/b/c"):
        with pytest.raises(openai.NotFoundError) as caught:
            await api.completions.create(model=name, prompt="abc", max_tokens=1)
        assert caught.value.code == "model_not_found"
        assert caught.value.param == "model"
    assert caught.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError, match="did you mean 'pirate'"):
        await api.completions.create(model="pirat", prompt="abc", max_tokens=1)


@pytest.mark.parametrize("prompts", [["abc", "de", "f"], [[66, 67], [68], [69, 70, 71]]])
async def test_a_list_of_prompts_has_a_choice_of_each_in_order(api, model, prompts):
    together = await api.completions.create(model=model, prompt=prompts, max_tokens=6, n=2,
                                            temperature=1, seed=5)  # fmt: skip
    assert [choice.index for choice in together.choices] == list(range(6))
    for index, prompt in enumerate(prompts):
        one = await api.completions.create(model=model, prompt=prompt, max_tokens=6, n=2,
                                           temperature=1, seed=5)  # fmt: skip
        texts = [choice.text for choice in together.choices[2 * index : 2 * index + 2]]
        assert texts == [choice.text for choice in one.choices]
    assert together.usage.prompt_tokens == 6
    assert together.usage.completion_tokens == 36


async def streamed(stream):
    """Returns the chunks of a stream, and the text of each choice."""
    chunks = [chunk async for chunk in stream]
    texts = {}
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
    return chunks, texts


async def test_a_stream_is_the_same_answer_in_pieces(api, model):
    asked = {"model": model, "prompt": ["abc", "de"], "max_tokens": 12, "n": 2, "seed": 3,
             "temperature": 0.9, "stop": "q"}  # fmt: skip
    whole = await api.completions.create(**asked)
    chunks, texts = await streamed(
        await api.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert texts == {choice.index: choice.text for choice in whole.choices}
    ends = {c.choices[0].index: c.choices[0].finish_reason for c in chunks[:-1]
            if c.choices[0].finish_reason}  # fmt: skip
    assert ends == {choice.index: choice.finish_reason for choice in whole.choices}
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


async def test_usage_is_only_told_of_a_stream_that_asks_for_it(http, model):
    body = {"model": model, "prompt": "abc", "max_tokens": 2, "stream": True}
    text = (await http.post("/v1/completions", json=body)).text
    events = text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all("usage" not in json.loads(event.removeprefix("data: ")) for event in events[:-2])
    always = {"include_usage": True, "continuous_usage_stats": True}
    text = (await http.post("/v1/completions", json={**body, "stream_options": always})).text
    *_, last, final, _, _ = text.split("\n\n")
    used = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    assert json.loads(last.removeprefix("data: "))["usage"] == used
    assert json.loads(final.removeprefix("data: "))["usage"].items() >= used.items()


async def test_explicit_nulls_and_neutral_values_are_as_if_they_were_left_out(api, http, model):
    plain = await api.completions.create(model=model, prompt="abc", max_tokens=4)
    body = {"model": model, "prompt": ["abc"], "frequency_penalty": 0, "logprobs": None,
            "max_tokens": 4, "n": 1, "presence_penalty": 0, "seed": None, "top_p": 1,
            "best_of": 1, "suffix": None, "echo": False, "temperature": 0,
            "user": "u1", "metadata": {"k": "v"}, "store": True}  # fmt: skip
    response = await http.post("/v1/completions", json=body)
    assert response.json()["choices"][0]["text"] == plain.choices[0].text


@pytest.mark.parametrize(
    ("field", "value"),
    [("suffix", "x"), ("best_of", 3), ("use_beam_search", True), ("logits_processors", [])],
)
async def test_what_is_not_served_is_refused_by_name(api, model, field, value):
    with pytest.raises(openai.BadRequestError, match=field) as caught:
        await api.completions.create(
            model=model, prompt="abc", max_tokens=1, extra_body={field: value}
        )
    assert caught.value.param == field
    assert caught.value.code == "unsupported_parameter"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tempature": 1}, "tempature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 1 << 70}, "n"),
        ({"stop": ["a", 1]}, "stop[1]"),
        ({"logprobs": 21}, "logprobs"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [99999]}, "prompt"),
        ({"prompt": ["a"] * 257}, "prompt"),
        ({"stream_options": {"include": 1}}, "stream_options.include"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_regex"),
        ({"timeout": 0}, "timeout"),
    ],
)
async def test_what_is_wrong_is_told_with_its_field(http, model, fields, param):
    body = {"model": model, "prompt": "abc", "max_tokens": 1}
    response = await http.post("/v1/completions", json=body | fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert error["message"]


async def test_a_request_without_a_model_is_refused(http):
    response = await http.post("/v1/completions", json={"prompt": "abc", "model": None})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "model"


async def test_log_probabilities_are_those_of_grpc_beside_the_likeliest(api, client, model):
    there = await client.generate("abc", max_tokens=5, logprobs=True)
    here = await api.completions.create(model=model, prompt="abc", max_tokens=5, logprobs=3)
    told = here.choices[0].logprobs
    assert told.token_logprobs == pytest.approx(there.logprobs, abs=1e-6)
    assert [max(top.values()) for top in told.top_logprobs] == told.token_logprobs
    assert all(1 <= len(top) <= 4 for top in told.top_logprobs)  # some are called the same
    assert len(told.tokens) == len(told.text_offset) == 5
    assert told.text_offset[0] == 0


@pytest.mark.parametrize("max_tokens", [0, 1])
async def test_an_echo_tells_the_log_probabilities_of_the_prompt(api, client, model, max_tokens):
    """As lm-eval asks: it compares the two numbers of a token for equality."""
    prompts = [[66, 67, 68, 69], [70, 66, 67]]
    answer = await api.completions.create(
        model=model, prompt=prompts, max_tokens=max_tokens, logprobs=1, echo=True, temperature=0,
        seed=1234,
    )  # fmt: skip
    for choice, prompt in zip(answer.choices, prompts, strict=True):
        scores = await client.score(prompt[:1], [prompt[1:]])
        told = choice.logprobs
        assert len(told.token_logprobs) == len(prompt) + max_tokens
        assert told.token_logprobs[0] is None
        assert told.top_logprobs[0] is None
        ours = told.token_logprobs[1 : len(prompt)]
        assert ours == pytest.approx(scores.continuations[0].logprobs, abs=1e-6)
        greedy = [
            logprob == max(top.values())
            for logprob, top in zip(ours, told.top_logprobs[1 : len(prompt)], strict=True)
        ]
        assert greedy == list(scores.continuations[0].is_greedy)
        assert choice.text.startswith("".join(told.tokens[: len(prompt)]))


async def test_an_echo_in_a_stream_comes_before_everything_else(api, model):
    asked = {"model": model, "prompt": "abc", "max_tokens": 3, "echo": True, "logprobs": 2}
    whole = await api.completions.create(**asked)
    chunks, texts = await streamed(await api.completions.create(**asked, stream=True))
    assert texts[0] == whole.choices[0].text
    parts = [c.choices[0].logprobs for c in chunks if c.choices[0].logprobs]
    for field in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
        told = [item for part in parts for item in getattr(part, field)]
        assert told == getattr(whole.choices[0].logprobs, field)


async def test_tokens_can_be_told_by_their_ids(http, model):
    body = {"model": model, "prompt": [66, 67], "max_tokens": 3, "logprobs": 1,
            "return_token_ids": True, "return_tokens_as_token_ids": True,
            "prompt_logprobs": 2}  # fmt: skip
    (choice,) = (await http.post("/v1/completions", json=body)).json()["choices"]
    assert choice["prompt_token_ids"] == [66, 67]
    assert choice["logprobs"]["tokens"] == [f"token_id:{i}" for i in choice["token_ids"]]
    assert choice["prompt_logprobs"][0] is None
    assert "67" in choice["prompt_logprobs"][1]


async def test_a_stop_text_ends_the_answer_and_is_told(api, model):
    whole = await api.completions.create(model=model, prompt="abc", max_tokens=20)
    text = whole.choices[0].text
    stop = text[5:7]
    cut = await api.completions.create(model=model, prompt="abc", max_tokens=20, stop=stop)
    assert cut.choices[0].text == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    assert cut.choices[0].stop_reason == stop


async def test_who_goes_away_cancels_what_it_asked_for(server, http, model):
    body = {"model": model, "prompt": ["abc", "d"], "max_tokens": 200, "ignore_eos": True}
    for streams in (False, True):
        asking = asyncio.create_task(http.post("/v1/completions", json={**body, "stream": streams}))
        while server.engine.num_open < 2:
            await asyncio.sleep(0.001)
        asking.cancel()
        while server.engine.num_open:
            await asyncio.sleep(0.001)


async def test_a_deadline_is_that_of_the_client(http, model):
    body = {"model": model, "prompt": "abc", "max_tokens": 200, "ignore_eos": True}
    for extra, headers in (
        ({"timeout": 1e-6}, {}),
        ({}, {"x-stainless-read-timeout": "0.000001"}),
    ):
        response = await http.post("/v1/completions", json=body | extra, headers=headers)
        assert response.status_code == 504, response.text
        assert response.headers["x-should-retry"] == "false"
    for header in ("nan", "-1", "soon", "inf"):
        response = await http.post(
            "/v1/completions", json={**body, "max_tokens": 1},
            headers={"x-stainless-read-timeout": header},
        )  # fmt: skip
        assert response.status_code == 200


async def test_a_prompt_that_cannot_be_served_ends_those_before_it(server, http, model):
    def num_cancelled():
        labels = {"outcome": "cancelled"}
        return server.metrics.registry.get_sample_value("redmux_requests_total", labels) or 0

    before = num_cancelled()
    body = {"model": model, "prompt": ["abc", "x" * 300], "max_tokens": 200, "ignore_eos": True}
    response = await http.post("/v1/completions", json=body)
    assert response.status_code == 400
    while server.engine.num_open:
        await asyncio.sleep(0.001)
    assert num_cancelled() == before + 1


def test_of_tokens_that_are_called_the_same_the_likeliest_is_told():
    """Of most bytes alone the name is the replacement character."""

    class Same:
        def of(self, token_id):
            return "\ufffd", b"\xff"

    told = CompletionLogprobs(TokenNames(Same(), as_ids=False), 2).take(
        [7], [-3.0], [[(5, -1.0), (6, -2.0)]]
    )
    assert told["top_logprobs"] == [{"\ufffd": -1.0}]
    by_id = CompletionLogprobs(TokenNames(Same(), as_ids=True), 2).take(
        [7], [float("-inf")], [[(5, -1.0), (6, -2.0)]]
    )
    assert by_id["top_logprobs"] == [{"token_id:5": -1, "token_id:6": -2, "token_id:7": -9999}]
