"""model_kind: which loader and which runner a model of the transformers library needs."""

from typing import Any, Literal

ModelKind = Literal["causal", "encoder", "encoder_decoder"]

_CAUSAL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def model_kind(config: Any) -> ModelKind:
    """Returns the kind of a model by its transformers config.

    The named architecture decides, because BERT and its like have causal siblings; without one a
    model is taken for causal.
    """
    if getattr(config, "is_encoder_decoder", False):
        return "encoder_decoder"
    names = getattr(config, "architectures", None) or ["ForCausalLM"]
    return "causal" if names[0].endswith(_CAUSAL) else "encoder"
