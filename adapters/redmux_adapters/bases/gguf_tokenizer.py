"""The tokenizer that a GGUF file describes: how it splits text, by the name that the file gives.

A GGUF file holds the vocabulary and the merges of a byte-level tokenizer, but of the pattern that
cuts text into words it has a name only (`tokenizer.ggml.pre`). With another model's pattern text
still becomes ids, which are not those that the model was trained on. So a name that is not in the
table here is refused.
"""

from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from gguf import GGUFReader
from huggingface_hub.errors import StrictDataclassError
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from redmux.errors import InvalidArgumentError

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # types of tokens that text may name
_SPECIAL_TOKENS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LONGEST_BLANKS = r"\s+(?!\S)|\s+"
_BLANKS = rf"\s*[\r\n]+|{_LONGEST_BLANKS}"
_ONE, _TO_THREE = r"\p{N}", r"\p{N}{1,3}"
_KANA_AND_HAN = r"[\u4E00-\u9FA5\u3040-\u30FF]+"
_ASCII_SIGN = r"[!-/:-@\[-`{-~]"


def _words(number: str, letter: str = r"\p{L}", behind_signs: str = r"[\r\n]*") -> str:
    """Words with the sign or blank before them, numbers, signs with the line's end, blanks."""
    return (
        rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[{letter}]+|{number}"
        rf"| ?[^\s{letter}\p{{N}}]+{behind_signs}|{_BLANKS}"
    )


def _cased(number: str, behind: str = "") -> str:
    """As `_words`, but a word ends where a capital follows a small letter."""
    first = r"[^\r\n\p{L}\p{N}]?"
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    return (
        rf"{first}{upper}*{lower}+{behind}|{first}{upper}+{lower}*{behind}"
        rf"|{number}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_BLANKS}"
    )


_GPT2 = rf"'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|{_LONGEST_BLANKS}"
_CL100K = _words(_TO_THREE)
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"  # noqa: RUF001
_DEEPSEEK_V3 = (
    _TO_THREE,
    _KANA_AND_HAN,
    rf"{_ASCII_SIGN}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_BLANKS}",
)


@dataclass(frozen=True, slots=True)
class _Family:
    """How a family of models cuts text: each pattern divides what those before it left whole."""

    patterns: tuple[str, ...]
    whole_words: bool = False  # a word of the vocabulary is one token, whatever the merges say
    bos: bool = False  # text begins with BOS, unless the file says otherwise


# By the values of `tokenizer.ggml.pre`. The names are llama.cpp's, whose converter gives them, and
# the patterns those of the models' own tokenizers, as far as they are published.
_NAMES = {
    "gpt-2 phi-2 mpt olmo jais trillion granite-docling gigachat a.x-4.0 mellum exaone4":
        _Family((_GPT2,)),
    "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2":
        _Family((_ONE, _GPT2)),
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano":
        _Family((_CL100K,), whole_words=True, bos=True),
    "dbrx smaug-bpe glm4 chatglm-bpe": _Family((_CL100K,)),
    "qwen2 deepseek-r1-qwen kormo megrez stablelm2 hunyuan solar-open grok-2 bailingmoe "
    "bailingmoe2 llada-moe f2llmv2":
        _Family((_words(_ONE),)),
    "qwen35": _Family((_words(_ONE, letter=r"\p{L}\p{M}"),)),
    "seed-coder": _Family((_words(_ONE, behind_signs=""),)),
    "gpt-4o llama4 kanana2 talkie minimax-m2": _Family((_cased(_TO_THREE, f"{_CONTRACTION}?"),)),
    "tekken": _Family((_cased(_ONE),), whole_words=True, bos=True),
    "minicpm5": _Family((_TO_THREE, _words(r"\p{N}+")), whole_words=True),
    "falcon": _Family((r"[\p{P}$+<=>^~|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "bloom poro-chat gpt3-finnish": _Family((_BLOOM,)),
    "viking": _Family((_BLOOM, _ONE)),
    "deepseek-llm": _Family((
        r"[\r\n]", r"\s?[\p{Lu}\p{Ll}\p{Lt}]+",
        r"\s?[!-/:-~\uFF01-\uFF0F\uFF1A-\uFF5E\u2018-\u201F\u3000-\u3002]+", r"\s+$",
        r"[\u0800-\u9FA5\uAC00-\uD7FF]+", r"\p{N}+",
    )),
    "deepseek-coder": _Family(
        (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[\u0800-\u9FA5\uAC00-\uD7FF]+", _ONE)
    ),
    "deepseek-v3 hunyuan-dense joyai-llm": _Family(_DEEPSEEK_V3),
}  # fmt: skip
_FAMILIES = {name: family for names, family in _NAMES.items() for name in names.split()}


def build_tokenizer(path: Path) -> Any:
    """Returns the transformers tokenizer of a GGUF file.

    Raises InvalidArgumentError where the file does not say how its model cuts text, or says it by
    a name that is not known here.
    """
    fields = _read(path)
    kind, architecture = fields.get("tokenizer.ggml.model"), fields.get("general.architecture", "")
    try:
        if kind == "gpt2":
            name = fields.get("tokenizer.ggml.pre")
            if name is None:
                raise _Unknown("it does not say how its model cuts text (tokenizer.ggml.pre)")
            if name not in _FAMILIES:
                raise _Unknown(f"nothing is known of {name!r}, as its model is said to cut text")
            family = _FAMILIES[name]
            return _finished(_byte_level(fields, family), fields, bos=family.bos)
        if kind == "llama" and not architecture.startswith("gemma"):
            return _finished(_sentencepiece(fields), fields, bos=True)
        return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    except (KeyError, OSError, ValueError, StrictDataclassError) as err:
        why = err if isinstance(err, _Unknown) else f"its tokenizer cannot be read: {err!r}"
        raise InvalidArgumentError(
            f"{path.name}: {why}; give the folder or hub id of the model's original tokenizer "
            "(--tokenizer)"
        ) from err


class _Unknown(ValueError):
    """How a model cuts text cannot be known from its file."""


def _read(path: Path) -> dict[str, Any]:
    try:
        fields = GGUFReader(path).fields
    except (OSError, ValueError, IndexError) as err:
        raise InvalidArgumentError(f"{path} is no GGUF file that can be read: {err}") from err
    wanted = ("tokenizer.", "general.architecture")
    return {name: field.contents() for name, field in fields.items() if name.startswith(wanted)}


def _finished(tokenizer: Tokenizer, fields: dict[str, Any], bos: bool) -> Any:
    """Returns it with the tokens that text may name, and what it puts around a text.

    `bos` tells whether text begins with BOS where the file does not say so.
    """
    tokens = fields["tokenizer.ggml.tokens"]
    kinds = fields.get("tokenizer.ggml.token_type", ())
    # Phi-3's own tokens take the blanks behind them.
    rstrip = fields["general.architecture"] == "phi3" and fields["tokenizer.ggml.model"] == "llama"
    tokenizer.add_tokens([
        AddedToken(
            token, normalized=False, special=kind != _USER_DEFINED,
            rstrip=rstrip and token not in ("<unk>", "<s>", "<|endoftext|>"),
        )
        for token, kind in zip(tokens, kinds, strict=False)
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ])  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=fields.get("tokenizer.chat_template"),
        add_bos_token=bool(fields.get("tokenizer.ggml.add_bos_token", bos)),
        add_eos_token=bool(fields.get("tokenizer.ggml.add_eos_token", False)),
        **{
            name: tokens[fields[key]] if key in fields else None
            for name, key in _SPECIAL_TOKENS.items()
        },
    )


def _byte_level(fields: dict[str, Any], family: _Family) -> Tokenizer:
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(_bpe(fields, merges, ignore_merges=family.whole_words))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in family.patterns),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(fields: dict[str, Any]) -> Tokenizer:
    """A vocabulary whose merges are the pairs of its tokens, the highest score first."""
    tokens, scores = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"]
    ids = {token: i for i, token in enumerate(tokens)}
    found = [
        (-scores[i], token[:cut], token[cut:])
        for token, i in ids.items()
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    merges = [(left, right) for _, left, right in sorted(found, key=itemgetter(0))]
    unknown = tokens[fields.get("tokenizer.ggml.unknown_token_id", 0)]
    model = _bpe(fields, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    has_prefix = fields.get("tokenizer.ggml.add_space_prefix", True)
    spell = normalizers.Replace(" ", "▁")
    prefix = normalizers.Prepend("▁")
    tokenizer.normalizer = normalizers.Sequence([prefix, spell]) if has_prefix else spell
    strip = [decoders.Strip(" ", 1, 0)] if has_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _bpe(fields: dict[str, Any], merges: list[tuple[str, str]], **options: Any) -> models.BPE:
    vocabulary = {token: i for i, token in enumerate(fields["tokenizer.ggml.tokens"])}
    try:
        return models.BPE(vocab=vocabulary, merges=merges, **options)
    except Exception as err:  # what tokenizers raises has no type of its own
        raise ValueError(f"its merges do not fit its vocabulary: {err}") from err
