"""Which kind of model a config is."""

import pytest
from transformers import BertConfig, LlamaConfig, T5Config

from redmux_adapters.bases.kind import model_kind


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (LlamaConfig(architectures=["LlamaForCausalLM"]), "causal"),
        (LlamaConfig(), "causal"),
        (LlamaConfig(architectures=["LlamaModel"]), "causal"),
        (BertConfig(architectures=["BertLMHeadModel"]), "causal"),
        (BertConfig(architectures=["BertForSequenceClassification"]), "encoder"),
        (BertConfig(architectures=["BertModel"]), "encoder"),
        (BertConfig(), "encoder"),
        (BertConfig(is_decoder=True), "causal"),
        (T5Config(architectures=["T5ForConditionalGeneration"]), "encoder_decoder"),
    ],
)
def test_family_and_named_architecture_of_a_config_decide(config, kind):
    assert model_kind(config) == kind
