"""Our tokenizers of GGUF files beside llama.cpp's own, over the vocabularies that come with it.

`make test-llama-cpp` builds it; without it these tests are skipped.
"""

import json
import random
import subprocess
from pathlib import Path

import pytest

from redmux.errors import InvalidArgumentError
from redmux_adapters.bases.gguf_tokenizer import build_tokenizer
from redmux_adapters.bases.load import packaged_gguf

LLAMA_CPP = Path(__file__).parents[2] / ".llama-cpp"
VOCABULARIES = sorted(LLAMA_CPP.glob("source/vendor/llama.cpp/models/ggml-vocab-*.gguf"))
# Their tokenizers are of kinds, or their files of architectures, that are not served from GGUF.
REFUSED = {"aquila", "bert-bge", "gemma-4", "gpt-neox", "nomic-bert-moe"}
PARTS = [
    "don't", " I'M", " we'Ll", "  ", "   ", "\t", "\t\t", "\n", "\n\n", "\r\n", " 1", "12345",
    "3.14", " x=", "camelCase", "HTTPServer", "où", " naïve", "日本", "ひらがな", "カタカナ",
    "한국어", "Привет", " мир", "العربية", "हिन्दी", "ไทย", "!!!", "...", "->", " //", "#include",
    "<tag>", "$5", "€", "²", "½", "Ⅷ", "٣", "e\u0301", "—", " “a”", "_x", "'", '"', "\\n",
    "http://a.b/c?d=e", "\u00a0", "\u3000", "\u200b", "z",
]  # fmt: skip
ASK = """
import json, sys
from llama_cpp import Llama
files, texts = json.load(sys.stdin)
found = []
for file in files:
    model = Llama(file, vocab_only=True, verbose=False)
    found.append([model.tokenize(text.encode(), add_bos=False, special=False) for text in texts])
    model.close()
json.dump(found, sys.stdout)
"""
needs_llama_cpp = pytest.mark.skipif(
    not VOCABULARIES, reason="no llama.cpp: `make test-llama-cpp` builds it"
)


def texts():
    draw = random.Random(0)
    return ["".join(draw.choices(PARTS, k=draw.randint(1, 9))) for _ in range(200)]


def name_of(path):
    return path.stem.removeprefix("ggml-vocab-")


@needs_llama_cpp
def test_texts_have_the_ids_of_llama_cpp():
    served = [path for path in VOCABULARIES if name_of(path) not in REFUSED]
    assert len(served) >= 14
    files = [*served, packaged_gguf()]
    asked = json.dumps([[str(path) for path in files], texts()])
    told = subprocess.run(
        [LLAMA_CPP / "bin/python", "-c", ASK], input=asked, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    for path, expected in zip(files, json.loads(told.stdout), strict=True):
        tokenizer = build_tokenizer(path)
        for text, ids in zip(texts(), expected, strict=True):
            ours = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
            assert ours == ids, (path.name, text)


@needs_llama_cpp
@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_is_not_served_from_such_files_is_refused_with_what_to_do(name):
    (path,) = (path for path in VOCABULARIES if name_of(path) == name)
    with pytest.raises(InvalidArgumentError, match="original tokenizer"):
        build_tokenizer(path)
