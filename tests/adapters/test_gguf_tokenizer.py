"""Text becomes the ids that the model of a GGUF file was trained on, or the file is refused.

The expected parts are those that llama.cpp cuts the same files' text into.
"""

import re
import unicodedata

import pytest
from gguf_files import chaining, write_gguf

from redmux.errors import InvalidArgumentError
from redmux_adapters.bases.gguf_tokenizer import build_tokenizer
from redmux_adapters.bases.load import load_tokenizer

TEXT = "don't say  12345,  x=\t 67 camelCase' où。\n\n  日本 8"
PARTS = {
    "gpt-2 phi-2 mpt olmo jais trillion granite-docling gigachat a.x-4.0 mellum exaone4":
        "don|'t| say| | 12345|,| | x|=|\t| 67| camelCase|'| où|。|\n\n | 日本| 8",
    "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2":
        "don|'t| say|  |1|2|3|4|5|,| | x|=|\t |6|7| camelCase|'| où|。|\n\n | 日本| |8",
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 dbrx smaug-bpe glm4 "
    "chatglm-bpe jina-v5-nano":
        "don|'t| say| | |123|45|,| | x|=|\t| |67| camelCase|'| où|。\n\n| | 日本| |8",
    "qwen2 qwen35 deepseek-r1-qwen kormo megrez stablelm2 hunyuan solar-open grok-2 bailingmoe "
    "bailingmoe2 llada-moe f2llmv2":
        "don|'t| say| | |1|2|3|4|5|,| | x|=|\t| |6|7| camelCase|'| où|。\n\n| | 日本| |8",
    "seed-coder":
        "don|'t| say| | |1|2|3|4|5|,| | x|=|\t| |6|7| camelCase|'| où|。|\n\n| | 日本| |8",
    "gpt-4o llama4 kanana2 talkie minimax-m2":
        "don't| say| | |123|45|,| | x|=|\t| |67| camel|Case|'| où|。\n\n| | 日本| |8",
    "tekken":
        "don|'t| say| | |1|2|3|4|5|,| | x|=|\t| |6|7| camel|Case|'| où|。\n\n| | 日本| |8",
    "minicpm5": "don|'t| say|  |123|45|,| | x|=|\t |67| camelCase|'| où|。\n\n| | 日本| |8",
    "falcon": "don|'|t| say| | |123|45|,| | x|=|\t| 67| camelCase|'| où|。|\n\n | 日本| 8",
    "bloom poro-chat gpt3-finnish":
        "don't| say| | 12345|, | x=|\t| 67| camelCase'| où|。\n\n | 日本| 8",
    "viking": "don't| say| | |1|2|3|4|5|, | x=|\t| |6|7| camelCase'| où|。\n\n | 日本| |8",
    "deepseek-llm": "don|'|t| say|  |12345|,| | x|=|\t |67| camelCase|'| o|ù|。|\n|\n|  |日本| |8",
    "deepseek-coder":
        "don|'|t| say|  |1|2|3|4|5|,| | x|=\t |6|7| camelCase|'| où|。|\n|\n| | |日本| |8",
    "deepseek-v3 hunyuan-dense joyai-llm":
        "don|'t| say|  |123|45|,| | x|=|\t |67| camelCase|'| où|。\n\n|  |日本| |8",
}  # fmt: skip
NAMES = [(name, parts) for names, parts in PARTS.items() for name in names.split()]


def parts_of(tokenizer, text):
    return [tokenizer.decode([i]) for i in tokenizer(text, add_special_tokens=False).input_ids]


@pytest.mark.parametrize(("name", "parts"), NAMES, ids=[name for name, _ in NAMES])
def test_a_file_cuts_text_as_the_models_of_its_name_do(tmp_path, name, parts):
    tokenizer = build_tokenizer(write_gguf(tmp_path / "m.gguf", *chaining(TEXT), pre=name))
    assert parts_of(tokenizer, TEXT) == parts.split("|")
    assert tokenizer.decode(tokenizer(TEXT, add_special_tokens=False).input_ids) == TEXT


@pytest.mark.parametrize("name", ["qwen35", "gpt-4o", "tekken"])
def test_combining_marks_stay_with_their_letters_where_the_model_has_it_so(tmp_path, name):
    """llama.cpp cuts them off for the latter two; the models' own tokenizers do not."""
    text = unicodedata.normalize("NFD", " vélo")
    tokenizer = build_tokenizer(write_gguf(tmp_path / "m.gguf", *chaining(text), pre=name))
    assert parts_of(tokenizer, text) == [text]


@pytest.mark.parametrize(
    ("name", "why"),
    [("telepathy", "nothing is known of 'telepathy'"), (None, "does not say how its model cuts"),
     ("default", "nothing is known of 'default'")],
)  # fmt: skip
def test_a_name_that_nobody_knows_is_refused_with_what_to_do(tmp_path, name, why):
    path = write_gguf(tmp_path / "m.gguf", *chaining("ab"), pre=name)
    with pytest.raises(InvalidArgumentError, match=rf"m.gguf: .*{re.escape(why)}.*--tokenizer"):
        build_tokenizer(path)


def test_merges_that_do_not_fit_the_vocabulary_are_refused(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", ["<a>", "<b>", "a"], ["a b"], pre="smollm")
    with pytest.raises(InvalidArgumentError, match="merges do not fit"):
        build_tokenizer(path)


def test_what_is_no_gguf_file_is_refused(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"none of it")
    with pytest.raises(InvalidArgumentError, match="no GGUF file"):
        build_tokenizer(path)


SPECIAL = ["<｜begin▁of▁sentence｜>", "</s>", "<think>", "<unk>", "  "]  # noqa: RUF001
KINDS = [3, 3, 4, 2, 4]


def special_file(path, pre, **fields):
    tokens, merges = chaining("ab x")
    tokens = [*SPECIAL, *tokens[2:], "xyz"]
    kinds = KINDS + [1] * (len(tokens) - len(KINDS))
    return write_gguf(path, tokens, merges, pre=pre, kinds=kinds, **fields)


def test_tokens_of_the_file_that_are_named_in_text_stay_whole(tmp_path):
    tokenizer = build_tokenizer(special_file(tmp_path / "m.gguf", "deepseek-llm"))
    text = f"a{SPECIAL[0]}b<think>  <unk>"
    ids = tokenizer(text).input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["a", SPECIAL[0], "b", "<think>", "  ", "<unk>"]
    assert ids[1::2] == [0, 2, 3]
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab<think>  "
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)


@pytest.mark.parametrize(
    ("pre", "fields", "around"),
    [
        ("smollm", {}, [0, 0]),
        ("llama-bpe", {}, [1, 0]),
        ("tekken", {}, [1, 0]),
        ("llama-bpe", {"add_bos_token": False}, [0, 0]),
        ("smollm", {"add_bos_token": True, "add_eos_token": True}, [1, 1]),
    ],
)
def test_special_tokens_are_put_around_a_text_as_the_file_or_its_family_says(
    tmp_path, pre, fields, around
):
    tokenizer = build_tokenizer(special_file(tmp_path / "m.gguf", pre, **fields))
    assert (
        tokenizer("ab").input_ids
        == [0] * around[0] + tokenizer.convert_tokens_to_ids(["ab"]) + [1] * around[1]
    )


def test_a_word_of_the_vocabulary_is_one_token_where_the_family_has_it_so(tmp_path):
    def parts(pre):
        tokenizer = build_tokenizer(special_file(tmp_path / "m.gguf", pre))
        return parts_of(tokenizer, "xyz")

    assert parts("llama-bpe") == ["xyz"]
    assert parts("smollm") == ["x", "y", "z"]


PIECES = ["<s>", "</s>", "<unk>", "<|x|>", "▁", "a", "b", "▁a", "ab", "▁ab", "\n"]
SCORES = [0.0, 0.0, 0.0, 0.0, -9.0, -9.0, -9.0, -1.0, -2.0, -3.0, -9.0]


def pieces_file(path, **fields):
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    kinds = [3, 3, 2, 3] + [1] * 7 + [6] * 256
    return write_gguf(
        path, PIECES + bytes_, kind="llama", kinds=kinds, scores=SCORES + [0.0] * 256,
        unk_token_id=2, **fields,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("ab", ["▁ab"]),
        (" ab", ["▁", "▁ab"]),
        ("aab", ["▁a", "ab"]),
        ("a<|x|>b\n", ["▁a", "<|x|>", "▁", "b", "\n"]),  # as the first Llamas' own tokenizer
        ("é", ["▁", "<0xC3>", "<0xA9>"]),
    ],
)
def test_vocabularies_with_scores_are_merged_and_prefixed_as_their_models_have_it(
    tmp_path, text, tokens
):
    tokenizer = build_tokenizer(pieces_file(tmp_path / "m.gguf"))
    assert tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids) == ["<s>", *tokens]


def test_no_blank_is_put_before_a_text_where_the_file_says_so(tmp_path):
    tokenizer = build_tokenizer(pieces_file(tmp_path / "m.gguf", add_space_prefix=False))
    ids = tokenizer("ab ab", add_special_tokens=False).input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["ab", "▁ab"]
    assert tokenizer.decode(ids) == "ab ab"


@pytest.mark.model
@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("x =  5", [104, 446, 256, 37]),
        ("a  1", [81, 256, 33]),
        ("    1. item", [289, 33, 30, 5033]),
        ("price:\t\t99", [17517, 42, 1656, 41, 41]),
        ("12345", [33, 34, 35, 36, 37]),
        ("I'm 1st in 2024", [57, 5248, 216, 33, 302, 281, 216, 34, 32, 34, 36]),
        ("plain words only", [21062, 1924, 805]),
    ],
)
def test_the_default_model_gets_the_ids_that_llama_cpp_gives(text, ids):
    assert load_tokenizer("smollm2")(text).input_ids == ids
