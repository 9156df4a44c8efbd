"""litellm in the ways in which it reaches servers that speak OpenAI's API."""

import asyncio

import litellm
import pytest

ASKED = [{"role": "user", "content": "What is the capital of France?"}]
SCHEMA = {
    "type": "object", "properties": {"city": {"type": "string", "maxLength": 12}},
    "required": ["city"], "additionalProperties": False,
}  # fmt: skip
litellm.suppress_debug_info = True


@pytest.fixture
def chat(url):
    def chat(model, **options):
        options = {"messages": ASKED, "temperature": 0, "max_tokens": 12, **options}
        return litellm.completion(model, api_base=f"{url}/v1", api_key="none", **options)

    return chat


def test_every_provider_gives_the_same_chat(chat):
    texts = {}
    for name in ("smollm2", "pirate", "smollm2:pirate"):
        for provider in ("openai", "hosted_vllm", "litellm_proxy"):
            answer = chat(f"{provider}/{name}")
            assert answer.choices[0].finish_reason in ("length", "stop")
            texts.setdefault(name, set()).add(answer.choices[0].message.content)
            assert answer.usage.completion_tokens > 0
    assert all(len(said) == 1 for said in texts.values())
    assert texts["pirate"] == texts["smollm2:pirate"] != texts["smollm2"]


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
def test_a_stream_is_the_same_text_with_its_usage(chat, provider):
    whole = chat(f"{provider}/pirate")
    chunks = list(chat(f"{provider}/pirate", stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_the_asynchronous_way_is_the_same(chat, url):
    async def ask():
        return await litellm.acompletion(
            "openai/pirate", messages=ASKED, temperature=0, max_tokens=12, api_base=f"{url}/v1",
            api_key="none",
        )  # fmt: skip

    answer = asyncio.run(ask())
    assert answer.choices[0].message.content == chat("openai/pirate").choices[0].message.content


def test_completions_of_texts(url):
    options = {"api_base": f"{url}/v1", "api_key": "none", "max_tokens": 6, "temperature": 0}
    model, prompt = "text-completion-openai/smollm2", "The capital of France is"
    whole = litellm.text_completion(prompt, model, logprobs=2, **options)
    assert "Paris" in whole.choices[0].text
    assert len(whole.choices[0].logprobs.token_logprobs) == 6
    stream = litellm.text_completion(prompt, model, stream=True, **options)
    assert "".join(chunk.choices[0].text or "" for chunk in stream) == whole.choices[0].text


def test_structure_and_fields_of_vllm(chat):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    for provider in ("openai", "hosted_vllm"):
        text = chat(f"{provider}/smollm2", response_format=form, max_tokens=40)
        assert text.choices[0].message.content.startswith('{"city": "')
        one = chat(f"{provider}/smollm2", extra_body={"guided_choice": ["Rome", "Paris"]})
        assert one.choices[0].message.content in ("Rome", "Paris")
    assert chat("hosted_vllm/smollm2", top_k=3, n=2, seed=1, temperature=1).choices[1]


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
def test_tools_are_called(tools_url, provider):
    tool = {"type": "function", "function": {"name": "lookup", "parameters": SCHEMA}}
    answer = litellm.completion(
        f"{provider}/smollm2", messages=ASKED, tools=[tool], tool_choice="required", max_tokens=60,
        temperature=0, api_base=f"{tools_url}/v1", api_key="none",
    )  # fmt: skip
    assert answer.choices[0].finish_reason == "tool_calls"
    assert answer.choices[0].message.tool_calls[0].function.name == "lookup"


def test_vectors(url):
    options = {"input": ["a", "b"], "api_base": f"{url}/v1", "api_key": "none"}
    for provider in ("openai", "hosted_vllm"):
        answer = litellm.embedding(f"{provider}/smollm2", **options)
        vectors = [row["embedding"] for row in answer.data]
        assert [len(vector) for vector in vectors] == [576, 576]
        assert sum(x * x for x in vectors[0]) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
def test_errors_become_the_classes_of_litellm(chat, provider):
    with pytest.raises(litellm.NotFoundError, match="nobody"):
        chat(f"{provider}/nobody")
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        chat(f"{provider}/smollm2", temperature=-1)
    with pytest.raises(litellm.ContextWindowExceededError):
        chat(f"{provider}/smollm2", messages=[{"role": "user", "content": "word " * 9000}])
