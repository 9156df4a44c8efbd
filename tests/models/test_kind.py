"""Which kind of model a config is."""

import pytest
from transformers import BertConfig, LlamaConfig, T5Config

from redmux_server.models.kind import model_kind


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (LlamaConfig(architectures=["LlamaForCausalLM"]), "causal"),
        (LlamaConfig(), "causal"),
        (BertConfig(architectures=["BertLMHeadModel"]), "causal"),
        (BertConfig(architectures=["BertForSequenceClassification"]), "encoder"),
        (BertConfig(architectures=["BertModel"]), "encoder"),
        (T5Config(architectures=["T5ForConditionalGeneration"]), "encoder_decoder"),
    ],
)
def test_the_architecture_that_a_config_names_decides(config, kind):
    assert model_kind(config) == kind
