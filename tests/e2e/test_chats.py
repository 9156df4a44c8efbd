"""Chats with tools, templates and continued messages on a running server."""

import pytest
from chat_templates import CALLED, CLOCK, LLAMA, QWEN, RESULT, TOOLS, tokenizer_of
from conftest import load_reference
from tokenizers_at_hand import CHATML, save_model_with

import redmux
from redmux import AsyncClient
from redmux_adapters import PromptFormat, Turn, to_bytes
from redmux_adapters.bases.load import load_tokenizer

USER = {"role": "user", "content": "the weather"}
TURNS = PromptFormat(user=Turn("Q: ", "\n"), assistant=Turn("A: ", "\n"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model_with(tokenizer_of(QWEN), tmp_path_factory.mktemp("chats"), 2048)


@pytest.fixture(scope="module")
def base_of(folder):
    return load_reference(folder)


@pytest.fixture
async def client(start_server, folder):
    server = await start_server(model=str(folder), max_running=8, allow_request_template=True)
    async with AsyncClient(f"127.0.0.1:{server.port}") as client:
        yield client


async def same(client, base_of, expected, messages, **options):
    """Whether a chat is completed as these tokens are."""
    asked = {"max_tokens": 4, "ignore_eos": True, "logprobs": True}
    told = await client.generate(expected, **asked)
    got = await client.generate(messages, **asked, **options)
    assert got.usage.prompt_tokens == len(expected)
    assert (got.token_ids, got.logprobs) == (told.token_ids, told.logprobs)


async def test_a_chat_is_completed_as_transformers_writes_it(client, base_of):
    call = {"name": "get_weather", "arguments": {"city": "Ulm", "days": 2}}
    called = {"role": "assistant", "tool_calls": [{"type": "function", "function": call}]}
    for template in (QWEN, LLAMA):
        ids = base_of.tokenizer.apply_chat_template(
            [USER, called, RESULT], tools=TOOLS, chat_template=template, enable_thinking=False,
            add_generation_prompt=True, tokenize=True, return_dict=False,
        )  # fmt: skip
        options = {} if template is QWEN else {"template": template}
        await same(
            client, base_of, ids, [USER, CALLED, RESULT], tools=TOOLS,
            template_args={"enable_thinking": False}, **options,
        )  # fmt: skip


async def test_a_final_message_goes_on(client, base_of):
    messages = [USER, {"role": "assistant", "content": "the ab"}]
    ids = base_of.tokenizer.apply_chat_template(
        messages, continue_final_message=True, tokenize=True, return_dict=False
    )
    await same(client, base_of, ids, messages, continue_final_message=True)
    ids = base_of.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    await same(client, base_of, ids, messages, add_generation_prompt=False)


async def test_tools_that_are_not_to_be_called_are_not_shown(client, base_of):
    ids = base_of.tokenizer.apply_chat_template(
        [USER], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    await same(client, base_of, ids, [USER], tools=TOOLS, tool_choice="none")


async def test_what_cannot_be_written_is_refused_and_nothing_else_is_harmed(client, base_of):
    adapter = base_of.adapter(1, prompt_format=TURNS)
    await client.adapters.put("turns", to_bytes(adapter))
    for options, message in (
        ({"adapter": "turns", "tools": TOOLS}, "prompt format cannot write tools"),
        ({"template": CHATML, "tools": TOOLS}, "writes no tools; ask without tools"),
        ({"template": "{{ raise_exception('Not so!') }}"}, "template refused: Not so!"),
        ({"template": "{% if %}"}, "request's chat template is none"),
        ({"template_args": {"messages": []}}, "template_args has 'messages'"),
        ({"tools": [CLOCK], "tool_choice": "x"}, "none of the tools"),
        ({"add_generation_prompt": True, "continue_final_message": True}, "exclude each other"),
    ):
        with pytest.raises(redmux.InvalidArgumentError, match=message):
            await client.generate([USER], max_tokens=1, **options)
    got = await client.generate(
        [USER], adapter="turns", tools=TOOLS, tool_choice="none", max_tokens=1
    )
    assert got.tool_calls == ()


async def test_an_adapters_format_gives_way_to_the_requests_template(client, base_of):
    adapter = base_of.adapter(1, size=0, prompt_format=TURNS)
    await client.adapters.put("turns", to_bytes(adapter))
    ids = base_of.tokenizer("the", add_special_tokens=False)["input_ids"]
    got = await client.generate([USER], adapter="turns", template="the", max_tokens=1)
    assert got.usage.prompt_tokens == len(ids)


async def test_templates_of_requests_are_refused_unless_the_operator_takes_them(
    start_server, folder
):
    server = await start_server(model=str(folder), max_running=8)
    async with AsyncClient(f"127.0.0.1:{server.port}") as client:
        with pytest.raises(redmux.FailedPreconditionError, match="--allow-request-template"):
            await client.generate([USER], template=CHATML, max_tokens=1)


@pytest.mark.model
def test_the_default_models_template_takes_chats_and_says_that_it_writes_no_tools():
    from redmux_adapters.text.encoder import TextEncoder
    from redmux_adapters.text.template import ChatOptions

    tokenizer = load_tokenizer("smollm2")
    encoder = TextEncoder(tokenizer)
    messages = [{"role": "system", "content": "Be brief."}, USER,
                {"role": "assistant", "content": "It is"}]  # fmt: skip
    for options, wanted in (
        ({"is_open": False, "is_continued": True}, {"continue_final_message": True}),
        ({}, {"add_generation_prompt": True}),
        ({"is_open": False}, {}),
    ):
        ids = encoder.encode(encoder.render(messages, None, ChatOptions(**options))).ids
        assert ids == tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=False, **wanted
        )
    with pytest.raises(redmux.InvalidArgumentError, match="writes no tools"):
        encoder.tool_format(None)
    with pytest.raises(redmux.InvalidArgumentError, match="chat template refused"):
        encoder.render([USER, CALLED], None)
    form = encoder.tool_format(QWEN)
    assert (form.tag, form.tokens) == ("<tool_call>", frozenset())
