import pytest

from redmux.errors import InvalidAdapterError, InvalidArgumentError
from redmux_adapters import PromptFormat, Turn

CHATML = PromptFormat(
    system=Turn("<|im_start|>system\n", "<|im_end|>\n"),
    user=Turn("<|im_start|>user\n", "<|im_end|>\n"),
    assistant=Turn("<|im_start|>assistant\n", "<|im_end|>\n"),
)
NO_SYSTEM = PromptFormat(CHATML.user, CHATML.assistant)


def message(role, content):
    return {"role": role, "content": content}


def test_every_turn_is_rendered_and_the_assistant_goes_on():
    text = CHATML.render(
        [
            message("system", "S"),
            message("user", "U"),
            message("assistant", "A"),
            message("user", "V"),
        ]
    )
    assert text == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n"
        "<|im_start|>assistant\nA<|im_end|>\n<|im_start|>user\nV<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_bare_text_stays_bare():
    bare = PromptFormat(Turn("", ""), Turn("", ""))
    assert bare.render([message("user", "{{ 7 * 7 }} {0} %s")]) == "{{ 7 * 7 }} {0} %s"


@pytest.mark.parametrize(
    ("form", "messages", "error"),
    [
        (CHATML, [], "no messages"),
        (NO_SYSTEM, [message("system", "x")], "message 0 has role 'system'.*without a system turn"),
        (NO_SYSTEM, [message("user", ""), message("tool", "x")], "message 1 has role 'tool'"),
        (CHATML, [message("type", "x")], "role 'type'; allowed: system, user, assistant"),
        (CHATML, [message("canonical", "x")], "role 'canonical'"),
        (CHATML, [{"content": "x"}], "role None"),
        (CHATML, [message("user", None)], "content None; it has to be a string"),
    ],
)
def test_impossible_conversations_are_refused_by_role(form, messages, error):
    with pytest.raises(InvalidArgumentError, match=error):
        form.render(messages)


@pytest.mark.parametrize("form", [CHATML, NO_SYSTEM])
def test_json_form_round_trips(form):
    assert PromptFormat.from_json(form.to_json()) == form
    assert form.to_json()["type"] == "turns"
    assert ("system" in form.to_json()) == (form.system is not None)


def altered(**changes):
    return {**NO_SYSTEM.to_json(), **changes}


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (None, "prompt_format is None"),
        ("chatml", "prompt_format is 'chatml'"),
        (altered(type="jinja"), '"type": "turns"'),
        ({"type": "turns", "user": ["", ""]}, "assistant is None"),
        (altered(tool=["", ""]), "unknown key 'tool'"),
        (altered(user="ab"), "user is 'ab'"),
        (altered(user=["a"]), r"user is \['a'\]"),
        (altered(user=["a", 1]), "user suffix is 1"),
        (altered(system=None), "system is None"),
        (altered(user=["x" * 257, ""]), "user prefix has 257 characters; limit 256"),
        (altered(user=["\ud800", ""]), "surrogate"),
    ],
)
def test_malformed_formats_are_refused(value, error):
    with pytest.raises(InvalidAdapterError, match=error):
        PromptFormat.from_json(value)


def test_construction_checks_as_the_file_does():
    with pytest.raises(InvalidAdapterError, match="assistant suffix has 300"):
        PromptFormat(Turn("", ""), Turn("", "x" * 300))
