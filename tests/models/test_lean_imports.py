"""A server imports transformers without torch's compiler, which is there for who asks for it."""

import subprocess
import sys

LEAN = """
import sys
from redmux_server.models.lean_imports import import_transformers, without_compiler
import_transformers()
import torch
import transformers
with without_compiler():
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1,
    )
    with torch.device("meta"):
        transformers.AutoModelForCausalLM.from_config(config)
heavy = {"torch._dynamo", "torch.distributed.tensor", "torch.nn.attention.flex_attention"}
assert heavy.isdisjoint(sys.modules), heavy & {*sys.modules}
assert "LlamaConfig" in dir(transformers.models.llama)
with without_compiler():
    stand_in = sys.modules["torch._dynamo"]
    assert stand_in.disable(len) is len
    from torch._dynamo import mark_static_address
    assert sys.modules["torch._dynamo"] is not stand_in
assert torch._dynamo.mark_static_address is mark_static_address
from transformers.masking_utils import TransformGetItemToIndex
with TransformGetItemToIndex():
    pass
"""


def test_serving_imports_no_compiler_and_who_asks_for_it_gets_the_real_one():
    subprocess.run([sys.executable, "-c", LEAN], check=True)
