"""Single tokens as text and bytes, with tokenizers that write them in different ways."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from redmux_server.models.text import TextCodec


@pytest.fixture(scope="module")
def codec(base):
    return TextCodec(base.tokenizer, None)


@given(text=st.text(max_size=20))
def test_the_bytes_of_tokens_joined_are_those_of_the_text(codec, text):
    ids = codec.encode(text).ids if text else []
    found = b"".join(codec.tokens.of(token_id)[1] for token_id in ids)
    assert found == text.encode()


def test_a_part_of_a_character_has_its_byte_and_no_text_of_its_own(codec):
    first, second = codec.encode("ä").ids
    assert codec.tokens.of(first) == ("\ufffd", "ä".encode()[:1])
    assert codec.tokens.of(second)[1] == "ä".encode()[1:]


def test_a_special_token_is_called_as_it_is_written(codec):
    assert codec.tokens.of(0) == ("<eos>", b"<eos>")


def test_a_byte_of_sentencepiece_and_a_blank_that_it_would_strip():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<unk>": 0, "▁a": 1, "▁b": 2, "<0xC3>": 3, "<0xA4>": 4, "a": 5, "▁": 6, "b": 7}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=[("▁", "a"), ("▁", "b")], unk_token="<unk>",
                   byte_fallback=True)
    )  # fmt: skip
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    codec = TextCodec(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>"), None)
    assert codec.tokens.of(2) == (" b", b" b")
    assert codec.tokens.of(3) == ("\ufffd", b"\xc3")
    assert codec.decode([2]) == "b"
