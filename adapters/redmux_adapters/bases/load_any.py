"""Load a base model of any kind that adapters are made for."""

from typing import Any

from redmux.errors import InvalidArgumentError

from .kind import model_kind
from .load import load_base, load_encoder, load_seq2seq_base, read_config, resolve
from .quiet import quietly


def load_any(spec: str) -> Any:
    """Returns the model of `spec` in fp32: bare for an encoder, else with its language-model head.

    `spec` is as for `load_base`, also for encoders and encoder-decoders. Raises
    InvalidArgumentError where nothing of that name can be loaded.
    """
    loaders = {
        "causal": load_base,
        "encoder": load_encoder,
        "encoder_decoder": load_seq2seq_base,
    }
    with quietly(reports=True):
        return loaders[model_kind(read_config(spec))](spec)[0]


def load_tokenizer(spec: str) -> Any:
    """Returns the tokenizer of `spec`; raises InvalidArgumentError where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(resolve(spec), trust_remote_code=False)
    except (OSError, ValueError) as err:
        raise InvalidArgumentError(f"cannot load the tokenizer of {spec!r}: {err}") from err
