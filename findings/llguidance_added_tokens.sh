#!/usr/bin/env bash
# llguidance decides by its spelling whether an added token is a special one: whatever stands in
# angle brackets is, though the tokenizer says "special": false, as those of Qwen and Hermes models
# do of <tool_call>. A Lark text literal then never matches that token: the mask forbids it and
# allows only its letters one by one, a spelling that the model was never trained on. The same
# literal in square brackets matches its token. So a grammar for such calls has to name the token,
# <tool_call> without quotes, even where the tokenizer's own flag says that it is ordinary text.
#
# Exits 1 if that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q llguidance==1.9.1 tokenizers==0.23.3 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import llguidance
import tokenizers
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

print("llguidance", llguidance.__version__, "tokenizers", tokenizers.__version__)


def tokenizer_with(text, special):
    """A tokenizer of single bytes, an end-of-text token and one added token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*letters, "<eos>"])}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken("<eos>", special=True)])
    made.add_tokens([AddedToken(text, special=special)])
    return made


def accepts(grammar, text, special, ids):
    made = tokenizer_with(text, special)
    of_grammar = LLTokenizer(
        made.to_str(), n_vocab=made.get_vocab_size(), eos_token=made.token_to_id("<eos>")
    )
    matcher = LLMatcher(of_grammar, grammar, log_level=0)
    return all(matcher.consume_token(i) for i in ids(made))


def whole(text):
    return lambda made: [made.token_to_id(text), made.token_to_id("o"), made.token_to_id("k")]


def spelled(text):
    return lambda made: [made.token_to_id(letter) for letter in text + "ok"]


seen = {}
for text in ("<tool_call>", "[tool_call]"):
    for special in (False, True):
        literal = f'start: "{text}ok"'
        seen[text, special] = (
            accepts(literal, text, special, whole(text)),
            accepts(literal, text, special, spelled(text)),
        )
        print(f"{text} special={special}: literal takes its token {seen[text, special][0]}, "
              f"its letters {seen[text, special][1]}")
named = accepts('start: <tool_call> "ok"', "<tool_call>", False, whole("<tool_call>"))
print("<tool_call> special=False, named in the grammar: takes its token", named)
as_described = named and seen == {
    ("<tool_call>", False): (False, True),  # the surprise
    ("<tool_call>", True): (False, True),
    ("[tool_call]", False): (True, True),
    ("[tool_call]", True): (False, True),
}
print("as described" if as_described else "CHANGED")
sys.exit(not as_described)
PYTHON
# Output seen:
# llguidance 1.9.1 tokenizers 0.23.3
# <tool_call> special=False: literal takes its token False, its letters True
# <tool_call> special=True: literal takes its token False, its letters True
# [tool_call] special=False: literal takes its token True, its letters True
# [tool_call] special=True: literal takes its token False, its letters True
# <tool_call> special=False, named in the grammar: takes its token True
# as described
