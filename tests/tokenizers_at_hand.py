"""Small tokenizers of the usual kinds, with special tokens and frames of every sort."""

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

UNKNOWN, BOS, EOS, START, END = range(5)
SPECIAL = {"<s>": BOS, "</s>": EOS, "<|im_start|>": START, "<|im_end|>": END}
_FIRST = {"<unk>": UNKNOWN} | SPECIAL
# A tokenizer takes these out of a text as well, but does not call them special.
PLAIN = ("<think>", "</think>", "<|User|>", "  ")
FRAMES = {"none": "$A", "begin": "<s> $A", "end": "$A </s>", "both": "<s> $A </s>"}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_MERGES = [("t", "h"), ("th", "e"), ("a", "b"), ("<", "|"), ("i", "m"), ("|", ">")]


def _with_merges(alphabet, blank):
    vocab = _FIRST | {char: len(_FIRST) + i for i, char in enumerate(sorted(alphabet))}
    merges = [*_MERGES, (blank, "the"), (blank, "ab"), (blank, blank)]
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    return {"vocab": vocab, "merges": merges}


def _bytes():
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(**_with_merges(alphabet, "\u0120")))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


_LETTERS = {chr(i) for i in range(33, 127)} | {"\n", "\u2581", "\u00e9"}


def _metaspace(scheme):
    options = _with_merges(_LETTERS, "\u2581")
    tokenizer = Tokenizer(models.BPE(**options, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return tokenizer


def _legacy():
    tokenizer = Tokenizer(models.BPE(**_with_merges(_LETTERS, "\u2581"), unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Replace("\u2581", " ")
    return tokenizer


def _unigram():
    first = [(text, 0.0) for text in _FIRST]
    pieces = [(char, -5.0) for char in sorted(_LETTERS)] + [("\u2581the", -3.0), ("ab", -4.0)]
    tokenizer = Tokenizer(models.Unigram([*first, *pieces], unk_id=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


KINDS = {
    "bytes": _bytes,
    "metaspace first": lambda: _metaspace("first"),
    "metaspace always": lambda: _metaspace("always"),
    "prepended": _legacy,
    "unigram": _unigram,
}


def make(kind="bytes", frame="none", template=CHATML, **flags):
    """A tokenizer of a kind; `flags` are those of all special tokens (lstrip, normalized, ...)."""
    tokenizer = KINDS[kind]()
    flags = {"normalized": False} | flags
    tokenizer.add_special_tokens([AddedToken(text, special=True, **flags) for text in _FIRST])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in PLAIN])
    tokenizer.post_processor = TemplateProcessing(
        single=FRAMES[frame], pair=f"{FRAMES[frame]} {FRAMES[frame].replace('A', 'B')}",
        special_tokens=[("<s>", BOS), ("</s>", EOS)],
    )  # fmt: skip
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = template
    return fast


def save_model_with(tokenizer, folder, max_positions):
    """A small random Llama with this tokenizer, in a folder."""
    from conftest import save_tiny_model  # tests of clients, which want none, have another
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        max_position_embeddings=max_positions, eos_token_id=EOS, bos_token_id=BOS,
        pad_token_id=EOS,
    )  # fmt: skip
    folder = save_tiny_model(folder, config)
    tokenizer.save_pretrained(folder)
    return folder
