"""Load a base model of any kind that adapters are made for."""

from typing import Any

from redmux.errors import InvalidArgumentError

from .base import is_encoder, load_base, load_encoder, resolve


def load_any(spec: str) -> Any:
    """Returns the model of `spec` in fp32: bare for an encoder, else with its language-model head.

    `spec` is as for `load_base`, also for encoders and encoder-decoders. Raises
    InvalidArgumentError where nothing of that name can be loaded.
    """
    if is_encoder(spec):
        return load_encoder(spec)[0]
    if _is_encoder_decoder(spec):
        return _load_encoder_decoder(spec)
    return load_base(spec)[0]


def load_tokenizer(spec: str) -> Any:
    """Returns the tokenizer of `spec`; raises InvalidArgumentError where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(resolve(spec), trust_remote_code=False)
    except (OSError, ValueError) as err:
        raise InvalidArgumentError(f"cannot load the tokenizer of {spec!r}: {err}") from err


def _is_encoder_decoder(spec: str) -> bool:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(resolve(spec), trust_remote_code=False)
    except (OSError, ValueError):
        return False  # load_base says what is wrong
    return bool(config.is_encoder_decoder)


def _load_encoder_decoder(spec: str) -> Any:
    import torch
    from transformers import AutoModelForSeq2SeqLM

    try:
        model = AutoModelForSeq2SeqLM.from_pretrained(
            resolve(spec), dtype=torch.float32, trust_remote_code=False
        )
    except (OSError, ValueError) as err:
        raise InvalidArgumentError(f"cannot load model {spec!r}: {err}") from err
    return model.eval().requires_grad_(False)
