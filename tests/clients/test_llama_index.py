"""LlamaIndex's client of servers that speak OpenAI's API."""

import asyncio

import pydantic
import pytest
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike

ASKED = [ChatMessage(role="user", content="What is the capital of France?")]


@pytest.fixture
def llm(url):
    def llm(model="smollm2", **options):
        options = {
            "temperature": 0, "max_tokens": 12, "max_retries": 0, "api_base": f"{url}/v1", **options
        }  # fmt: skip
        return OpenAILike(model=model, api_key="none", **options)

    return llm


def test_chats_whole_and_streamed(llm):
    texts = {}
    for name in ("smollm2", "pirate"):
        model = llm(name, is_chat_model=True)
        whole = model.chat(ASKED).message.content
        *_, last = model.stream_chat(ASKED)
        assert last.message.content == whole
        texts[name] = whole
        assert asyncio.run(llm(name, is_chat_model=True).achat(ASKED)).message.content == whole
    assert texts["pirate"] != texts["smollm2"]


def test_completions_whole_and_streamed(llm):
    prompt = "The capital of France is"
    whole = llm().complete(prompt).text
    assert "Paris" in whole
    assert "".join(part.delta for part in llm().stream_complete(prompt)) == whole
    assert llm(is_chat_model=True).complete(prompt).text


def test_without_a_limit_an_answer_ends_by_itself(llm):
    model = llm("sentiment", max_tokens=None, is_chat_model=True)
    assert model.chat([ChatMessage(role="user", content="a great film")]).message.content


class City(pydantic.BaseModel):
    """A city."""

    name: str = pydantic.Field(max_length=12)
    is_capital: bool


def test_structured_answers_and_calls(llm, tools_url):
    model = llm(
        api_base=f"{tools_url}/v1",
        is_chat_model=True, is_function_calling_model=True, should_use_structured_outputs=True,
        max_tokens=80,
    )  # fmt: skip
    answer = model.as_structured_llm(City).chat(ASKED)
    assert isinstance(answer.raw, City)
    tool = FunctionTool.from_defaults(fn=lambda city: city, name="lookup", description="A city.")
    called = model.chat_with_tools([tool], "Where is Paris?", tool_required=True)
    (call,) = model.get_tool_calls_from_response(called)
    assert call.tool_name == "lookup"
