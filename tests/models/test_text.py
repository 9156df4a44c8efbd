"""TextCodec: prompts to ids and ids to text, and what it refuses."""

import contextlib
from types import SimpleNamespace

import pytest
from conftest import TEMPLATE
from transformers import AutoTokenizer

from redmux.errors import InvalidArgumentError
from redmux_adapters import PromptFormat
from redmux_adapters.format.prompt import Turn
from redmux_server.models.text import TextCodec

USER = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def tokenizer(tiny_folder):
    return AutoTokenizer.from_pretrained(tiny_folder)


@pytest.fixture
def codec(tokenizer):
    return TextCodec(tokenizer, None)


@pytest.mark.parametrize("text", ["", "Hello there", "  spaces\n\n\tkept ", "é 漢字 🦊"])
def test_a_text_comes_back_from_its_ids(codec, text):
    ids = codec.encode(text).ids
    assert len(ids) == len(text.encode())
    assert codec.decode(ids) == text


def test_decode_leaves_special_tokens_out(codec):
    ids = codec.encode("ab").ids
    assert codec.decode([0, *ids, 0]) == "ab"


def test_decode_takes_any_sequence(codec):
    assert codec.decode(tuple(codec.encode("ab").ids)) == "ab"
    assert codec.decode(()) == ""


def test_a_chat_is_rendered_by_the_models_template_up_to_the_answer(codec):
    messages = [{"role": "system", "content": "S"}, *USER, {"role": "assistant", "content": "A"}]
    ids = codec.encode_chat(messages, None).ids
    assert codec.decode(ids) == "[system]S[user]Hi[assistant]A[assistant]"


def test_a_prompt_format_goes_before_the_models_template(codec):
    form = PromptFormat(user=Turn("Q: ", "\n"), assistant=Turn("A:", "\n"))
    assert codec.decode(codec.encode_chat(USER, form).ids) == "Q: Hi\nA:"


def test_a_prompt_format_needs_no_template(tokenizer):
    tokenizer.chat_template = None
    form = PromptFormat(user=Turn("Q: ", "\n"), assistant=Turn("A:", "\n"))
    codec = TextCodec(tokenizer, None)
    assert codec.decode(codec.encode_chat(USER, form).ids) == "Q: Hi\nA:"


def test_a_model_without_a_template_refuses_chats(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(InvalidArgumentError, match="no chat template; send the prompt as text"):
        TextCodec(tokenizer, None).encode_chat(USER, None)


@pytest.mark.parametrize("role", ["wizard", "", "User", "function"])
def test_an_unknown_role_is_refused_by_name(codec, role):
    with pytest.raises(InvalidArgumentError, match=f"message 1 has role '{role}'"):
        codec.encode_chat([*USER, {"role": role, "content": "x"}], None)


def test_a_long_role_is_cut_in_the_message(codec):
    with pytest.raises(InvalidArgumentError) as caught:
        codec.encode_chat([{"role": "x" * 10_000, "content": ""}], None)
    assert len(caught.value.message) < 200


@pytest.mark.parametrize("form", [None, PromptFormat(Turn("", ""), Turn("", ""))])
def test_an_empty_chat_is_refused(codec, form):
    with pytest.raises(InvalidArgumentError, match="no messages"):
        codec.encode_chat([], form)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].nothing.at_all }}",
        "{% if %}",
    ],
)
def test_what_a_template_raises_is_an_invalid_argument(tokenizer, template):
    tokenizer.chat_template = template
    with pytest.raises(InvalidArgumentError, match="chat template refused"):
        TextCodec(tokenizer, None).encode_chat(USER, None)


def test_the_templates_own_words_reach_the_caller(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InvalidArgumentError, match="roles must alternate"):
        TextCodec(tokenizer, None).encode_chat(USER, None)


def test_a_template_cannot_change_the_callers_messages(tokenizer):
    tokenizer.chat_template = "{% set _ = messages[0].update({'content': 'other'}) %}" + TEMPLATE
    messages = [dict(USER[0])]
    codec = TextCodec(tokenizer, None)
    with contextlib.suppress(InvalidArgumentError):  # the sandbox may refuse it
        codec.encode_chat(messages, None)
    assert messages == USER


@pytest.mark.parametrize(
    ("generation", "own", "expected"),
    [
        ([3, 5], 0, {0, 3, 5}),
        (7, 0, {0, 7}),
        (0, 0, {0}),
        (None, 0, {0}),
        ([3], None, {3}),
        (None, None, set()),
        (0, None, {0}),
    ],
)
def test_eos_ids_are_those_of_the_model_and_of_the_tokenizer(tokenizer, generation, own, expected):
    tokenizer.eos_token = None if own is None else "<eos>"
    codec = TextCodec(tokenizer, SimpleNamespace(eos_token_id=generation))
    assert codec.eos_token_ids == expected


def test_without_a_generation_config_the_tokenizers_eos_counts(codec):
    assert codec.eos_token_ids == {0}


LONG = {
    "text": lambda codec, text, most: codec.encode(text, most),
    "input": lambda codec, text, most: codec.encode_input(text, most),
    "pair": lambda codec, text, most: codec.encode_pair("a", text, most),
    "chat": lambda codec, text, most: codec.encode_chat(
        [{"role": "user", "content": text}], None, most=most
    ),
    "continuation": lambda codec, text, most: codec.encode_continuation("a", [1], text, most),
}


@pytest.mark.parametrize("way", LONG)
def test_a_text_far_too_long_is_refused_by_its_beginning(codec, monkeypatch, way):
    encoded, bare = [], codec._encoder.bare
    monkeypatch.setattr(codec._encoder, "bare", lambda t: encoded.append(len(t)) or bare(t))
    with pytest.raises(InvalidArgumentError, match=r"more than 336 tokens; limit 100"):
        LONG[way](codec, "x" * 1500, 100)
    assert sum(encoded) <= 400


@pytest.mark.parametrize("way", LONG)
def test_a_text_that_may_fit_is_encoded_whole(codec, way):
    assert LONG[way](codec, "x" * 450, 450)
    assert LONG[way](codec, "x" * 450, 400)  # too long by so little is told by the number


def test_what_a_template_adds_counts(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}" + "x" * 100 + "{% endfor %}"
    codec = TextCodec(tokenizer, None)
    with pytest.raises(InvalidArgumentError, match="the chat has 2000 bytes with its turns"):
        codec.encode_chat(USER * 20, None, most=100)
    assert codec.encode_chat(USER * 16, None, most=1600)
