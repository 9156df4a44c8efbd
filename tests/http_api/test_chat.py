"""/v1/chat/completions and /v1/responses through the openai package."""

import json

import openai
import pytest

ASKED = [{"role": "user", "content": "Capital of France?"}]


async def streamed(stream):
    chunks = [chunk async for chunk in stream]
    texts = {}
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
    return chunks, texts


async def test_a_chat_is_that_of_grpc(api, client, server, model):
    there = await client.generate(ASKED, max_tokens=8)
    here = await api.chat.completions.create(model=model, messages=ASKED, max_tokens=8)
    (choice,) = here.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == there.text
    assert choice.finish_reason == "length"
    assert here.usage.prompt_tokens == there.usage.prompt_tokens
    assert here.system_fingerprint == server.model.fingerprint
    assert here.redmux["digest"] is None


async def test_a_stream_begins_with_the_role_and_ends_with_the_reason(api, model):
    asked = {"model": model, "messages": ASKED, "max_completion_tokens": 9, "n": 3, "seed": 2,
             "temperature": 1}  # fmt: skip
    whole = await api.chat.completions.create(**asked)
    chunks, texts = await streamed(
        await api.chat.completions.create(
            **asked, stream=True, stream_options={"include_usage": True}
        )
    )
    assert texts == {choice.index: choice.message.content for choice in whole.choices}
    assert len(set(texts.values())) > 1
    assert [c.choices[0].delta.role for c in chunks[:3]] == ["assistant"] * 3
    assert all(c.choices[0].delta.role is None for c in chunks[3:-1])
    ends = [c.choices[0] for c in chunks[:-1] if c.choices[0].finish_reason]
    assert sorted(end.index for end in ends) == [0, 1, 2]
    assert all(end.delta.content is None for end in ends)
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}


async def test_the_streaming_helper_of_the_client_gathers_the_same(api, model):
    long = await api.chat.completions.create(model=model, messages=ASKED, max_tokens=20)
    asked = {"model": model, "messages": ASKED, "stop": long.choices[0].message.content[8:10]}
    whole = await api.chat.completions.create(**asked)
    async with api.chat.completions.stream(**asked) as stream:
        gathered = await stream.get_final_completion()
    assert gathered.choices[0].message.content == whole.choices[0].message.content


async def test_the_synchronous_client_works_as_well(url, model, api):
    import asyncio

    def ask():
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as sync:
            whole = sync.chat.completions.create(model=model, messages=ASKED, max_tokens=6)
            stream = sync.chat.completions.create(
                model=model, messages=ASKED, max_tokens=6, stream=True
            )
            text = "".join(c.choices[0].delta.content or "" for c in stream)
            return whole.choices[0].message.content, text

    whole, text = await asyncio.to_thread(ask)
    assert whole == text


async def test_log_probabilities_of_a_chat_bring_their_bytes(api, client, model):
    there = await client.generate(ASKED, max_tokens=5, logprobs=True)
    here = await api.chat.completions.create(
        model=model, messages=ASKED, max_tokens=5, logprobs=True, top_logprobs=2
    )
    content = here.choices[0].logprobs.content
    assert [token.logprob for token in content] == pytest.approx(there.logprobs, abs=1e-6)
    for token in content:
        assert len(token.top_logprobs) == 2
        assert token.top_logprobs[0].logprob == token.logprob  # greedy
    data = bytes(byte for token in content for byte in token.bytes)
    assert data.decode(errors="replace") == here.choices[0].message.content
    stream = await api.chat.completions.create(
        model=model, messages=ASKED, max_tokens=5, logprobs=True, top_logprobs=2, stream=True
    )
    told = [
        token async for chunk in stream for c in chunk.choices if c.logprobs
        for token in c.logprobs.content
    ]  # fmt: skip
    assert told == content


async def test_fields_without_effect_are_accepted(api, model):
    plain = await api.chat.completions.create(model=model, messages=ASKED, max_tokens=4)
    full = await api.chat.completions.create(
        model=model, messages=ASKED, max_tokens=4, max_completion_tokens=4, service_tier="auto",
        frequency_penalty=0, presence_penalty=0, logit_bias={}, metadata={"k": "v"}, n=1,
        parallel_tool_calls=False, reasoning_effort="low", store=False, user="u1", top_p=1,
        temperature=0, stream=False,
    )  # fmt: skip
    assert full.choices[0].message.content == plain.choices[0].message.content


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"audio": {"voice": "x"}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"prediction": {}}, "prediction"),
        ({"function_call": "auto"}, "function_call"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [1]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, None),
        ({"messages": [{"role": "user"}]}, None),
        ({"messages": [{"content": "x"}]}, None),
        ({"messages": [{"role": "nobody", "content": "x"}]}, None),
    ],
)
async def test_what_a_chat_cannot_be_is_refused(http, model, fields, param):
    body = {"model": model, "messages": ASKED, "max_tokens": 1}
    response = await http.post("/v1/chat/completions", json=body | fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert param in (None, error["param"])


async def test_an_adapter_answers_a_chat_in_its_own_format(api, base, put, client, model):
    await put("chatty", base.adapter(3))
    there = await client.generate(ASKED, adapter="chatty", max_tokens=6)
    here = await api.chat.completions.create(model="chatty", messages=ASKED, max_tokens=6)
    assert here.choices[0].message.content == there.text
    assert here.redmux["adapter"] == "chatty"


async def test_a_response_is_the_answer_of_a_chat(api, model):
    chat = await api.chat.completions.create(
        model=model, max_tokens=7,
        messages=[{"role": "system", "content": "x"}, {"role": "user", "content": "hi"}],
    )  # fmt: skip
    expected = chat.choices[0].message.content
    parts = [{"type": "input_text", "text": "h"}, {"type": "input_text", "text": "i"}]
    for given in ("hi", [{"role": "user", "content": "hi"}], [{"role": "user", "content": parts}]):
        answer = await api.responses.create(
            model=model, input=given, instructions="x", max_output_tokens=7
        )
        assert answer.output_text == expected
        assert answer.status == "incomplete"
        assert answer.incomplete_details.reason == "max_output_tokens"
        assert answer.usage.output_tokens == 7
        assert answer.output[0].role == "assistant"


async def test_a_response_is_streamed_as_events_in_their_order(api, model):
    asked = {"model": model, "input": "hi", "max_output_tokens": 7, "top_logprobs": 1,
             "include": ["message.output_text.logprobs"]}  # fmt: skip
    whole = await api.responses.create(**asked)
    events = [event async for event in await api.responses.create(**asked, stream=True)]
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(e.delta for e in events[4:-4]) == whole.output_text == events[-4].text
    told = [entry for event in events[4:-4] for entry in event.logprobs]
    assert [t.logprob for t in told] == [t.logprob for t in whole.output[0].content[0].logprobs]
    assert events[-1].response.output[0].content[0].text == whole.output_text
    assert events[0].response.redmux == {"adapter": None, "digest": None}  # nothing is there yet


async def test_every_answer_tells_how_long_it_took(http, model):
    """Completions, chats and responses alike, whole and streamed."""
    for path, body in (
        ("/v1/completions", {"prompt": "hi", "max_tokens": 3}),
        ("/v1/chat/completions", {"messages": ASKED, "max_tokens": 3}),
        ("/v1/responses", {"input": "hi", "max_output_tokens": 3}),
    ):
        response = await http.post(path, json={"model": model, **body})
        streamed = await http.post(path, json={"model": model, **body, "stream": True})
        data = [line[6:] for line in streamed.text.splitlines() if line.startswith("data: {")]
        last = json.loads(data[-1])
        for told in (response.json()["redmux"], last.get("response", last)["redmux"]):
            assert set(told) == {
                "adapter", "digest", "first_token_s", "total_s", "added_special_tokens",
            }  # fmt: skip
            assert 0 < told["first_token_s"] <= told["total_s"], path


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"include": ["file_search_call.results"]}, "include[0]"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].type"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0]",
        ),
        ({"input": [{"role": "user"}]}, "input[0]"),
        ({"input": []}, "input"),
        ({"input": 1}, "input"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
    ],
)
async def test_what_needs_memory_or_more_is_refused_of_a_response(http, model, fields, param):
    response = await http.post("/v1/responses", json={"model": model, "input": "hi"} | fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


async def test_what_fails_in_mid_stream_is_its_last_event(http, api, model, server, monkeypatch):
    from redmux.errors import AbortedError
    from redmux_server.services.generation import Generation

    deltas = Generation.deltas

    async def failing(self):
        async for delta in deltas(self):
            yield delta
            raise AbortedError("the engine died")

    monkeypatch.setattr(Generation, "deltas", failing)
    body = {"model": model, "messages": ASKED, "max_tokens": 9, "stream": True}
    text = (await http.post("/v1/chat/completions", json=body)).text
    *_, error, done, end = text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    told = json.loads(error.removeprefix("data: "))["error"]
    assert told == {"message": "the engine died", "type": "invalid_request_error", "param": None,
                    "code": "aborted"}  # fmt: skip
    with pytest.raises(openai.APIError, match="the engine died"):
        await streamed(await api.chat.completions.create(**body))


CALL = '{"name": "clock", "arguments": {"zone": "Ulm"}}'
SAID = ["Let me see. <tool", f"_call>\n{CALL[:30]}", f"{CALL[30:]}\n</tool_call>"]
TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}]


@pytest.fixture
def calling(monkeypatch):
    """The model writes a call of a tool, in its template's format."""
    from redmux_adapters.text.tool_format import ToolFormat
    from redmux_server.engine.request import FinishReason
    from redmux_server.services.choice import Delta, Finish
    from redmux_server.services.generation import Generation
    from redmux_server.services.tools import ToolCallParser

    async def deltas(self):
        for text in SAID:
            yield Delta(0, text, [1])
        yield Delta(0, finish=Finish(FinishReason.STOP, "", 3, 0, 0, 3))
        self.cancel()

    form = ToolFormat("<tool_call>", "<tool_call>\n", "\n</tool_call>")
    monkeypatch.setattr(Generation, "deltas", deltas)
    monkeypatch.setattr(Generation, "tool_parser", lambda self: ToolCallParser(form, ["clock"]))


async def test_calls_of_tools_are_told_as_such(api, model, calling):
    answer = await api.chat.completions.create(model=model, messages=ASKED)
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name) == ("function", "clock")
    assert json.loads(call.function.arguments) == {"zone": "Ulm"}
    async with api.chat.completions.stream(model=model, messages=ASKED) as stream:
        gathered = (await stream.get_final_completion()).choices[0]
    assert gathered.finish_reason == "tool_calls"
    assert gathered.message.content == "Let me see."
    (streamed_call,) = gathered.message.tool_calls
    assert streamed_call.function.name == "clock"
    assert json.loads(streamed_call.function.arguments) == {"zone": "Ulm"}
    assert streamed_call.id


async def test_the_turns_of_a_tool_are_taken_as_clients_send_them(http, model):
    turns = [
        *ASKED,
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "clock", "arguments": "{}"}},
        ]},
        {"role": "tool", "tool_call_id": "call_1", "content": "ok"},
    ]  # fmt: skip
    body = {"model": model, "messages": turns, "max_tokens": 1}
    response = await http.post("/v1/chat/completions", json=body)
    assert response.status_code in (200, 400)  # this template may know no tools
    parts = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    joined = await http.post("/v1/chat/completions", json={**body, "messages": parts})
    assert joined.status_code == 200
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    refused = await http.post("/v1/chat/completions", json={**body, "messages": image})
    assert refused.status_code == 400
    assert "image_url" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "web_search"}]}, {"tools": "x"}, {"tools": [1]},
        {"tool_choice": "required"}, {"tools": TOOLS, "tool_choice": "other"},
        {"tools": TOOLS, "tool_choice": {"type": "function"}},
        {"tools": TOOLS, "tool_choice": {"type": "allowed_tools"}},
    ],
)  # fmt: skip
async def test_tools_that_cannot_be_called_are_refused(http, model, fields):
    body = {"model": model, "messages": ASKED, "max_tokens": 1, **fields}
    response = await http.post("/v1/chat/completions", json=body)
    assert response.status_code == 400, response.text
