"""Matchers for the vocabulary of the engine without a model: token 0 ends, 1 to 7 are a to g."""

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from redmux_server.engine.grammar import Matcher

END = 0
_VOCAB = {"<eos>": END} | {letter: i + 1 for i, letter in enumerate("abcdefg")}


def _tokenizer():
    tokenizer = Tokenizer(models.BPE(vocab=_VOCAB, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    return LLTokenizer(tokenizer.to_str(), n_vocab=len(_VOCAB), eos_token=[END])


_TOKENIZER = _tokenizer()


def make_matcher(regex):
    """A matcher of texts in the letters a to g."""
    state = LLMatcher(_TOKENIZER, LLMatcher.grammar_from_regex(regex))
    assert not state.is_error()
    return Matcher(state, np.frombuffer(state.compute_bitmask(), np.uint8))


def allowed(matcher):
    """The ids that may follow, as far as that was computed."""
    return np.unpackbits(matcher.mask, bitorder="little").nonzero()[0].tolist()


def ids(text):
    return [_VOCAB[letter] for letter in text]
