"""What is compiled ahead is what a server then calls."""

import numba
import pytest
import torch

from redmux.errors import FailedPreconditionError
from redmux_adapters import load_base
from redmux_server.models.causal.attention import discover
from redmux_server.models.cpu import fused_decoder
from redmux_server.models.cpu.ahead import types_of_pass
from redmux_server.models.cpu.kvcache import NumbaKVCache
from redmux_server.models.kvcache import Segment


@pytest.fixture(scope="module")
def discovered(tiny_folder):
    model, _ = load_base(str(tiny_folder))
    return model, *discover(model)


@pytest.mark.parametrize(
    ("precision", "kv_dtype"),
    [("fp32", "float32"), ("fp32", "bfloat16"), ("int8", "bfloat16"), ("int4", "bfloat16"),
     ("bf16", "float32")],
)  # fmt: skip
def test_the_types_compiled_ahead_are_those_of_a_decoder(
    precision, kv_dtype, discovered, monkeypatch
):
    try:
        expected = types_of_pass(precision, kv_dtype)
    except FailedPreconditionError as err:
        pytest.skip(str(err))
    called = []
    monkeypatch.setattr(
        fused_decoder, "run", lambda *arguments: called.append(tuple(map(numba.typeof, arguments)))
    )
    model, shapes, rules = discovered
    cache = NumbaKVCache(shapes, 8, getattr(torch, kv_dtype))
    decoder = fused_decoder.FusedDecoder(model, rules, cache, fused_decoder.pack(model, precision))
    ids, last = torch.arange(5), torch.tensor([4])
    with torch.inference_mode(), cache.step([Segment(0, 5, 0, [3])]):
        decoder(ids, ids, last, None, {})
        decoder.hidden(ids, ids, last, None, {})
    assert called == [expected, expected]
