"""ToolFormat: found from what a template writes."""

import pytest
from chat_templates import HERMES, LLAMA, QWEN, TEMPLATES, tokenizer_of
from tokenizers_at_hand import CHATML, make

from redmux.errors import InvalidArgumentError
from redmux_adapters.text.encoder import TextEncoder
from redmux_adapters.text.tool_format import ToolFormat

TOKENS = frozenset({"<tool_call>", "</tool_call>"})
TAGGED = ToolFormat("<tool_call>", "<tool_call>\n", "\n</tool_call>", tokens=TOKENS)
FORMATS = {
    "qwen": TAGGED,
    "hermes": TAGGED,
    "llama": ToolFormat(arguments_key="parameters"),
    "smollm": ToolFormat("<tool_call>", "<tool_call>[", "]</tool_call>", True, tokens=TOKENS),
}


@pytest.mark.parametrize("family", TEMPLATES)
def test_the_format_of_a_family_is_found(family):
    encoder = TextEncoder(tokenizer_of(TEMPLATES[family]))
    assert encoder.tool_format(None) == FORMATS[family]


def test_a_template_of_the_request_has_its_own_format():
    encoder = TextEncoder(tokenizer_of(QWEN))
    assert encoder.tool_format(LLAMA) == FORMATS["llama"]
    assert encoder.tool_format(None) == FORMATS["qwen"]


def test_a_format_that_the_template_only_describes_is_found():
    described = LLAMA.replace("{%- if m.tool_calls %}", "{%- if false %}")
    assert TextEncoder(tokenizer_of(described)).tool_format(None) == FORMATS["llama"]
    described = HERMES.replace("m.role == 'assistant' and m.tool_calls", "false")
    assert TextEncoder(tokenizer_of(described)).tool_format(None) == FORMATS["hermes"]


def test_a_python_tag_is_a_tag():
    tagged = LLAMA.replace(
        """assistant\\n\\n{"name": "' +""", """assistant\\n\\n<|python_tag|>{"name": "' +"""
    )
    form = TextEncoder(tokenizer_of(tagged)).tool_format(None)
    assert form == ToolFormat(
        "<|python_tag|>", "<|python_tag|>", arguments_key="parameters",
        tokens=frozenset({"<|python_tag|>"}),
    )  # fmt: skip


def test_a_list_between_tags_is_found():
    listed = QWEN.replace("""<tool_call>\\n{"name": "' +""", """<tool_call>[{"name": "' +""")
    listed = listed.replace("""'}\\n</tool_call>'""", """'}]\\n</tool_call>'""")
    assert TextEncoder(tokenizer_of(listed)).tool_format(None) == ToolFormat(
        "<tool_call>", "<tool_call>[", "]\n</tool_call>", is_list=True, tokens=TOKENS
    )


def test_whether_tags_are_tokens_is_told():
    assert TextEncoder(make(template=QWEN)).tool_format(None).tokens == set()
    tokenizer = make(template=QWEN)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool_call>", "</tool_call>"]})
    assert TextEncoder(tokenizer).tool_format(None).is_special


def test_a_template_that_writes_no_tools_is_refused():
    with pytest.raises(InvalidArgumentError, match="writes no tools; ask without"):
        TextEncoder(make(template=CHATML)).tool_format(None)


@pytest.mark.parametrize("tag", ["[TOOL_CALLS]", "<call>"])
def test_a_format_that_is_not_known_is_refused(tag):
    other = QWEN.replace("<tool_call>", tag)
    with pytest.raises(InvalidArgumentError, match="a way that this server does not read"):
        TextEncoder(tokenizer_of(other)).tool_format(None)
