"""Which attention a device gets: the first that is there and right, with the reason."""

import pytest
import torch

from redmux_server.models.cuda.paged_choice import candidates, choose_attention
from redmux_server.models.cuda.paged_torch import TorchAttention
from redmux_server.models.kvcache import LayerShape

CPU = torch.device("cpu")
SHAPES = [LayerShape(4, 2, 16)] * 2


class Good(TorchAttention):
    block_size = 256


class Wrong(TorchAttention):
    def __call__(self, step, rule, query, keys, values):
        return super().__call__(step, rule, query, keys, values) * 1.01


class WrongInDecodes(TorchAttention):
    def __call__(self, step, rule, query, keys, values):
        out = super().__call__(step, rule, query, keys, values)
        return out.roll(1, 0) if step.max_count == 1 else out


class BlindToWindows(TorchAttention):
    def __call__(self, step, rule, query, keys, values):
        rule = type(rule)(rule.shape, rule.scale, 0, rule.softcap)
        return super().__call__(step, rule, query, keys, values)


class Leaking(TorchAttention):
    """Multiplies what it does not see by zero."""

    def __call__(self, step, rule, query, keys, values):
        out = super().__call__(step, rule, query, keys, values)
        return out + 0 * values[step.blocks.long()].sum()


class Broken(TorchAttention):
    def __call__(self, step, rule, query, keys, values):
        raise RuntimeError("no kernel image is available\nfor this device")


def missing():
    raise ImportError("No module named 'triton'")


def choose(*tried, dtype=torch.float32):
    return choose_attention([(f"lib{i}", t) for i, t in enumerate(tried)], SHAPES, CPU, dtype)


def test_the_first_right_one_is_chosen():
    attention, reason = choose(Good, Wrong)
    assert type(attention) is Good
    assert reason == "attention: lib0"


def test_one_that_is_missing_is_passed_over_and_named():
    attention, reason = choose(missing, Good)
    assert type(attention) is Good
    assert reason == "attention: lib1 (lib0 is not installed)"


@pytest.mark.parametrize("kind", [Wrong, WrongInDecodes, BlindToWindows, Leaking])
def test_one_that_computes_wrongly_is_refused(kind):
    attention, reason = choose(kind)
    assert type(attention) is TorchAttention
    assert reason.startswith("attention: torch over gathered pages (lib0 differs from plain")


def test_one_that_raises_is_refused_with_its_first_line():
    _, reason = choose(Broken)
    assert reason == (
        "attention: torch over gathered pages "
        "(lib0 failed: RuntimeError: no kernel image is available)"
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_held_against_half_precision(dtype):
    assert type(choose(Good, dtype=dtype)[0]) is Good


def test_a_gpu_tries_the_kernels_and_the_cpu_nothing():
    assert candidates(CPU, torch.float32) == []
    names = [name for name, _ in candidates(torch.device("cuda"), torch.bfloat16)]
    assert names == ["Triton"]
