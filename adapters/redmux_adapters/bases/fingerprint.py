"""Tells base models apart, whatever precision a copy of them is kept in."""

import hashlib
from typing import Any

import torch
from torch import nn


def fingerprint(model: nn.Module) -> str:
    """Returns "<model_type>-<hidden size>x<layers>-<16 hexadecimal digits>" of a base model.

    `model` is what AutoModelForCausalLM or its siblings load, before its modules are replaced. The
    digits are the start of a SHA-256 over the name and the values, cast to bf16, of every
    one-dimensional parameter in the order of the names. Norm weights and biases are never
    quantised, so fp32, bf16 and dequantised GGUF copies of one checkpoint agree, and fine-tuned
    relatives do not. Models whose one-dimensional parameters are all trivial, such as freshly
    initialised ones, differ by their shape only.
    """
    config: Any = model.config
    text_config = config.get_text_config()
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if parameter.dim() != 1:
            continue
        values = parameter.detach().to("cpu", torch.bfloat16).view(torch.int16)
        for content in (name.encode(), values.numpy().astype("<i2", copy=False).tobytes()):
            digest.update(len(content).to_bytes(8, "little"))
            digest.update(content)
    shape = f"{text_config.hidden_size}x{text_config.num_hidden_layers}"
    return f"{config.model_type}-{shape}-{digest.hexdigest()[:16]}"
