"""LangChain's OpenAI classes."""

import asyncio

import pydantic
import pytest
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

ASKED = "What is the capital of France?"


class City(pydantic.BaseModel):
    """A city."""

    name: str = pydantic.Field(max_length=12)
    is_capital: bool


@tool
def lookup(city: str) -> str:
    """Tells about a city."""
    return f"{city} is large"


@pytest.fixture
def chat(url):
    def chat(model="smollm2", **options):
        options = {
            "temperature": 0, "max_tokens": 16, "max_retries": 0, "base_url": f"{url}/v1", **options
        }  # fmt: skip
        return ChatOpenAI(model=model, api_key="none", **options)

    return chat


def test_an_answer_a_stream_and_a_batch_are_the_same(chat):
    texts = {}
    for name in ("smollm2", "pirate"):
        model = chat(name)
        whole = model.invoke(ASKED)
        texts[name] = whole.content
        assert whole.usage_metadata["output_tokens"] > 0
        assert whole.response_metadata["model_name"] == name
        assert "".join(chunk.content for chunk in model.stream(ASKED)) == whole.content
        assert [answer.content for answer in model.batch([ASKED] * 4)] == [whole.content] * 4
    assert texts["pirate"] != texts["smollm2"]


def test_the_asynchronous_way_is_the_same(chat):
    async def ask():
        return (await chat().ainvoke(ASKED)).content, [c async for c in chat().astream(ASKED)]

    whole, chunks = asyncio.run(ask())
    assert whole == chat().invoke(ASKED).content == "".join(chunk.content for chunk in chunks)


def test_a_stream_tells_its_usage(chat):
    told = [c.usage_metadata for c in chat(stream_usage=True).stream(ASKED) if c.usage_metadata]
    assert [usage["output_tokens"] for usage in told] == [
        chat().invoke(ASKED).usage_metadata["output_tokens"]
    ]


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(chat, tools_url, method):
    model = chat(max_tokens=80, base_url=f"{tools_url}/v1")
    found = model.with_structured_output(City, method=method).invoke(ASKED)
    assert isinstance(found, City)


def test_a_prompt_that_is_too_long_has_its_own_class(chat):
    with pytest.raises(ContextOverflowError):
        chat().invoke("word " * 9000)


def test_tools_are_called_and_their_results_taken(chat, tools_url):
    model = chat(max_tokens=80, base_url=f"{tools_url}/v1").bind_tools(
        [lookup], tool_choice="lookup"
    )
    answer = model.invoke(ASKED)
    (call,) = answer.tool_calls
    assert call["name"] == "lookup"
    assert set(call["args"]) == {"city"}
    gathered = None
    for chunk in model.stream(ASKED):
        gathered = chunk if gathered is None else gathered + chunk
    assert gathered.tool_calls[0]["args"] == call["args"]
    turns = [HumanMessage(ASKED), answer, ToolMessage("large", tool_call_id=call["id"])]
    after = chat(base_url=f"{tools_url}/v1").bind_tools([lookup]).invoke(turns)
    assert after.usage_metadata["input_tokens"] > answer.usage_metadata["input_tokens"]


def test_log_probabilities(chat):
    answer = chat().bind(logprobs=True, top_logprobs=2).invoke(ASKED)
    assert answer.response_metadata["logprobs"]["content"][0]["top_logprobs"]


def test_completions_of_texts(url):
    model = OpenAI(
        model="smollm2", base_url=f"{url}/v1", api_key="none", max_tokens=6, temperature=0
    )
    prompt = "The capital of France is"
    assert "Paris" in model.invoke(prompt)
    assert "".join(model.stream(prompt)) == model.invoke(prompt)
    assert model.batch([prompt, prompt]) == [model.invoke(prompt)] * 2


def test_vectors(url):
    model = OpenAIEmbeddings(
        model="smollm2", base_url=f"{url}/v1", api_key="none", check_embedding_ctx_length=False
    )
    both = model.embed_documents(["a", "b"])
    assert [len(vector) for vector in both] == [576, 576]
    assert model.embed_query("a") == pytest.approx(both[0], abs=1e-6)


def test_the_api_of_responses(chat):
    answer = chat(use_responses_api=True).invoke(ASKED)
    assert answer.text
    text = "".join(chunk.text for chunk in chat(use_responses_api=True).stream(ASKED))
    assert text == answer.text
