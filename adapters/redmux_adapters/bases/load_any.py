"""Load a base model of any kind that adapters are made for."""

from typing import Any

from .kind import ModelKind, model_kind
from .load import load_model, read_config


def load_any(spec: str) -> Any:
    """Returns the model of `spec` in fp32: bare for an encoder, else with its language-model head.

    `spec` is as for `load_base`, also for encoders and encoder-decoders. Raises
    InvalidArgumentError where nothing of that name can be loaded.
    """
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    kinds: dict[ModelKind, Any] = {
        "causal": AutoModelForCausalLM,
        "encoder": AutoModel,
        "encoder_decoder": AutoModelForSeq2SeqLM,
    }
    return load_model(kinds[model_kind(read_config(spec))], spec)
