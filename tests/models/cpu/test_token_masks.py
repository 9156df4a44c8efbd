"""The kernel that takes out of logits what grammars bar; tests/engine/test_grammar.py has more."""

import numpy as np
import pytest
import torch

from redmux_server.config import ServerConfig
from redmux_server.device import choose
from redmux_server.engine.grammar import apply_masks, bar_tokens
from redmux_server.metrics import Metrics
from redmux_server.models.cpu import token_masks
from redmux_server.models.load_causal import load_causal
from redmux_server.wiring import make_engine


def test_no_request_waits_for_a_compiler_once_it_is_chosen():
    bar = token_masks.choose_bar(torch.device("cpu"), torch.float32)
    known = set(token_masks._bar.overloads)
    mask = np.frombuffer(bytes(16), np.uint8)  # read-only, as those of beginnings are
    with torch.inference_mode():
        bar(torch.zeros(3, 128)[[0, 2]], [1], [mask])
    assert set(token_masks._bar.overloads) == known


@pytest.mark.parametrize(
    ("device", "dtype"), [("cpu", torch.bfloat16), ("cuda", torch.float32)], ids=str
)
def test_other_logits_are_barred_by_torch(device, dtype):
    assert token_masks.choose_bar(torch.device(device), dtype) is bar_tokens


def test_the_engine_of_a_loaded_model_bars_by_the_kernel(tiny_folder):
    config = ServerConfig(model=str(tiny_folder))
    engine = make_engine(config, load_causal(config, choose(config)), Metrics())
    assert engine._stepper._bar is token_masks.bar_in_memory


def test_rows_without_a_mask_keep_their_bits():
    logits = torch.randn(5, 49152, generator=torch.Generator().manual_seed(0))
    logits[0, :4] = torch.tensor([-0.0, float("nan"), float("inf"), 1e-45])
    before = logits.clone()
    mask = np.zeros(49152 // 8, np.uint8)
    apply_masks(logits, [None, mask, None, mask, None], token_masks.bar_in_memory)
    kept = [0, 2, 4]
    assert np.array_equal(
        logits[kept].numpy().view(np.uint32), before[kept].numpy().view(np.uint32)
    )
    assert logits[[1, 3]].isneginf().all()
