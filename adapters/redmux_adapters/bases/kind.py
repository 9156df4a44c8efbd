"""model_kind: which loader and which runner a model of the transformers library needs."""

from typing import Any, Literal

ModelKind = Literal["causal", "encoder", "encoder_decoder"]


def model_kind(config: Any) -> ModelKind:
    """Returns the kind of a model by its transformers config.

    BERT and its like have causal siblings, which a flag or the named architecture tells apart. What
    is of no family of encoders is taken for causal.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    if getattr(config, "is_encoder_decoder", False):
        return "encoder_decoder"
    if getattr(config, "is_decoder", False):
        return "causal"
    if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in config.architectures or ()):
        return "causal"
    return "encoder" if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES else "causal"
