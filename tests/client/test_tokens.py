"""What `tokenize` and `detokenize` send and return, of both clients and of the commands."""

import pytest

import redmux


def test_a_text_is_tokenized(client, server):
    found = client.tokenize("a", adapter="x", token_texts=True, add_special_tokens=False)
    assert found == redmux.Tokens((1, 7), ("<s>", '"a'), 1, 256, "x", None)
    (call,) = server.seen("Tokenize")
    sent = call.request
    assert (sent.text, sent.adapter, sent.token_texts) == ("a", "x", True)
    assert sent.HasField("add_special_tokens")
    assert not sent.add_special_tokens


def test_texts_of_tokens_are_none_unless_they_are_asked_for(client, server):
    assert client.tokenize("a").token_texts is None
    (call,) = server.seen("Tokenize")
    assert not call.request.HasField("add_special_tokens")


def test_a_chat_is_tokenized_with_its_options(client, server):
    tools = [{"type": "function", "function": {"name": "f"}}]
    client.tokenize(
        [{"role": "user", "content": "a"}], tools=tools, add_generation_prompt=False,
        parse_special_tokens=True,
    )  # fmt: skip
    chat = server.seen("Tokenize")[0].request.chat
    assert chat.messages[0].content == "a"
    assert chat.tools[0].name == "f"
    assert chat.HasField("add_generation_prompt")
    assert chat.parse_special_tokens


def test_tokens_become_text(client, server):
    assert client.detokenize([7, 8]) == "héllo"
    assert list(server.seen("Detokenize")[0].request.token_ids) == [7, 8]


def test_what_no_message_can_hold_is_refused_at_once(client, server):
    for prompt, options, message in (
        ([1, 2], {}, "token ids are tokens already"),
        ("a", {"adapter": ""}, "adapter is empty"),
        ("a", {"tools": [{}]}, "tools is for chats"),
        ("a", {"add_special_tokens": "no"}, "add_special_tokens is 'no', must be True or False"),
        (5, {}, "prompt is a text"),
    ):
        with pytest.raises(redmux.InvalidArgumentError, match=message):
            client.tokenize(prompt, **options)
    with pytest.raises(TypeError, match="did you mean 'adapter'"):
        client.tokenize("a", model="x")
    for ids in ("ab", [1 << 40], 5):
        with pytest.raises(redmux.InvalidArgumentError, match="token_ids"):
            client.detokenize(ids)
    assert not server.calls


def test_the_commands_print_a_line_per_token_and_the_text(run, server):
    assert run("tokenize", "a", "--chat", "--adapter", "x") == (0, '1\t"<s>"\n7\t"\\"a"\n', "")
    assert server.seen("Tokenize")[0].request.chat.messages[0].content == "a"
    assert run("tokenize", "a", "--no-special-tokens")[0] == 0
    assert not server.seen("Tokenize")[1].request.add_special_tokens
    assert run("detokenize", "7", "8") == (0, "héllo\n", "")
