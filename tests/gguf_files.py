"""Tiny GGUF files, written for tests."""

from pathlib import Path

import gguf
import numpy as np
from tokenizers import pre_tokenizers

HIDDEN, FEED_FORWARD = 32, 64


def spelled(text: str) -> str:
    """The text as byte-level vocabularies spell it."""
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return whole.pre_tokenize_str(text)[0][0] if text else ""


def chaining(text: str) -> tuple[list[str], list[str]]:
    """A vocabulary and merges by which every part of `text` that is not cut becomes one token."""
    tokens = dict.fromkeys(["<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])
    merges = {}
    chars = spelled(text)
    for start in range(len(chars)):
        for end in range(start + 2, len(chars) + 1):
            tokens[chars[start:end]] = None
            merges[f"{chars[start : end - 1]} {chars[end - 1]}"] = None
    return list(tokens), list(merges)


def write_gguf(
    path: Path, tokens, merges=None, *, kind="gpt2", pre=None, kinds=None, scores=None, seed=None,
    **fields,
) -> Path:  # fmt: skip
    """A GGUF file of a llama: with random weights if there is a `seed`, else without any.

    `fields` are those of the tokenizer that GGUFWriter has methods for: add_bos_token=True.
    """
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds or [3 if token.startswith("<") else 1 for token in tokens])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    if merges is not None:
        writer.add_token_merges(merges)
    if scores is not None:
        writer.add_token_scores(scores)
    for name, value in fields.items():
        getattr(writer, f"add_{name}")(value)
    if seed is not None:
        for name, tensor in _weights(len(tokens), np.random.default_rng(seed)).items():
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _weights(num_tokens: int, random) -> dict[str, np.ndarray]:
    square, wide = (HIDDEN, HIDDEN), (FEED_FORWARD, HIDDEN)
    shapes = {
        "token_embd": (num_tokens, HIDDEN), "output": (num_tokens, HIDDEN),
        "output_norm": (HIDDEN,), "blk.0.attn_norm": (HIDDEN,), "blk.0.attn_q": square,
        "blk.0.attn_k": square,
        "blk.0.attn_v": square, "blk.0.attn_output": square, "blk.0.ffn_norm": (HIDDEN,),
        "blk.0.ffn_gate": wide, "blk.0.ffn_up": wide, "blk.0.ffn_down": (HIDDEN, FEED_FORWARD),
    }  # fmt: skip
    return {
        f"{name}.weight": random.standard_normal(shape).astype(np.float32)
        for name, shape in shapes.items()
    }
