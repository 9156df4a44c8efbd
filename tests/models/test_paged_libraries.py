"""The adapters of attention libraries that need a GPU: what they call, recorded by stand-ins."""

import sys
from types import ModuleType
from typing import ClassVar

import numpy as np
import pytest
import torch

from redmux_server.models.kvcache import LayerShape, Segment
from redmux_server.models.paged_cache import PagedKVCache
from redmux_server.models.paged_flashinfer import FlashInferAttention
from redmux_server.models.paged_step import HostIndex, PagedStep, to_device
from redmux_server.models.paged_torch import TorchAttention
from redmux_server.models.paged_varlen import VarlenAttention

CPU = torch.device("cpu")
SHAPE = LayerShape(8, 2, 64)


class Wrapper:
    """Stands in for FlashInfer's wrappers, with the signatures of 0.7.2."""

    made: ClassVar[list] = []

    def __init__(self, float_workspace_buffer, kv_layout="NHD", **options):
        assert float_workspace_buffer.dtype == torch.uint8
        self.layout, self.options, self.plans, self.runs = kv_layout, options, [], []
        self.made.append(self)

    def run(self, q, paged_kv_cache):
        self.runs.append((q, paged_kv_cache))
        return torch.zeros_like(q)


class Decode(Wrapper):
    def plan(
        self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, *,
        window_left=-1, logits_soft_cap=None, q_data_type="float16", kv_data_type=None,
        sm_scale=None,
    ):  # fmt: skip
        self.plans.append(dict(locals()))


class Prefill(Wrapper):
    def plan(
        self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads,
        num_kv_heads, head_dim_qk, page_size, *, causal=False, sm_scale=None, window_left=-1,
        logits_soft_cap=None, q_data_type="float16", kv_data_type=None,
    ):  # fmt: skip
        self.plans.append(dict(locals()))


@pytest.fixture
def wrappers(monkeypatch):
    module = ModuleType("flashinfer")
    module.BatchDecodeWithPagedKVCacheWrapper = Decode
    module.BatchPrefillWithPagedKVCacheWrapper = Prefill
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setattr(Wrapper, "made", [])
    return Wrapper.made


@pytest.fixture
def flashinfer(wrappers):
    return FlashInferAttention(CPU, torch.bfloat16)


def run(attention, segments, calls=((0, 0.0),), shape=SHAPE, dtype=torch.bfloat16, blocks=20):
    """One step; the layer is called once for each (window, softcap)."""
    cache = PagedKVCache([shape], blocks, attention, CPU, dtype)
    total = sum(s.count for s in segments)
    q, k, v = (
        torch.randn(1, heads, total, shape.head_dim).to(dtype)
        for heads in (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
    )
    with cache.step(segments):
        outs = [cache.layers[0](q, k, v, 0.125, window, cap) for window, cap in calls]
    return cache, (q, k, v), outs


DECODES = [Segment(0, 1, 63, [4, 9, 1]), Segment(1, 1, 64, [7, 0, 5])]
MIXED = [Segment(0, 1, 63, [4, 9]), Segment(1, 5, 30, [7, 0])]


def test_decodes_are_planned_as_flashinfer_counts_pages(flashinfer, wrappers):
    cache, (q, _, _), _ = run(flashinfer, DECODES)
    (wrapper,) = wrappers
    (plan,) = wrapper.plans
    assert type(wrapper) is Decode
    assert plan["indptr"].tolist() == [0, 2, 5]
    assert plan["indices"].tolist() == [4, 9, 7, 0, 5]
    assert plan["last_page_len"].tolist() == [32, 1]
    assert {plan[k].dtype for k in ("indptr", "indices", "last_page_len")} == {torch.int32}
    assert (plan["num_qo_heads"], plan["num_kv_heads"], plan["head_dim"]) == (8, 2, 64)
    assert (plan["page_size"], plan["sm_scale"]) == (32, 0.125)
    assert (plan["window_left"], plan["logits_soft_cap"]) == (-1, 0.0)
    assert plan["q_data_type"] is plan["kv_data_type"] is torch.bfloat16
    got, (keys, values) = wrapper.runs[0]
    assert torch.equal(got, q[0].transpose(0, 1))
    assert got.is_contiguous()
    assert keys is cache.layers[0].keys
    assert values is cache.layers[0].values


def test_a_mixed_step_is_one_causal_prefill(flashinfer, wrappers):
    run(flashinfer, MIXED)
    (wrapper,) = wrappers
    (plan,) = wrapper.plans
    assert type(wrapper) is Prefill
    assert plan["causal"]
    assert plan["qo_indptr"].tolist() == [0, 1, 6]
    assert plan["paged_kv_indptr"].tolist() == [0, 2, 4]
    assert plan["paged_kv_indices"].tolist() == [4, 9, 7, 0]
    assert plan["paged_kv_last_page_len"].tolist() == [32, 3]


def test_the_newest_keys_are_in_the_pages_before_the_call(flashinfer):
    cache, (_, k, v), _ = run(flashinfer, DECODES)
    for pages, fresh in ((cache.layers[0].keys, k), (cache.layers[0].values, v)):
        assert torch.equal(pages[9, 31], fresh[0, :, 0])  # position 63 of the first
        assert torch.equal(pages[5, 0], fresh[0, :, 1])  # position 64 of the second


def test_a_rule_is_planned_once_a_step_for_all_of_its_layers(flashinfer, wrappers):
    run(flashinfer, DECODES, [(0, 0.0), (20, 0.0), (0, 0.0), (20, 0.0)])
    full, windowed = wrappers
    assert [len(w.plans) for w in wrappers] == [1, 1]
    assert [len(w.runs) for w in wrappers] == [2, 2]
    assert full.plans[0]["window_left"] == -1
    assert windowed.plans[0]["window_left"] == 19  # beside the row's own key
    run(flashinfer, DECODES)
    assert len(full.plans) == 2
    assert len(wrappers) == 2


def test_a_soft_cap_is_passed_on(flashinfer, wrappers):
    run(flashinfer, DECODES, [(0, 30.0)])
    assert wrappers[0].plans[0]["logits_soft_cap"] == 30.0


def test_the_kernels_that_zero_what_lies_behind_the_last_key_are_asked_for(flashinfer, wrappers):
    run(flashinfer, DECODES)
    run(flashinfer, MIXED)
    assert [w.options["backend"] for w in wrappers] == ["fa2", "fa2"]
    assert [w.layout for w in wrappers] == ["NHD", "NHD"]
    assert wrappers[0].options["use_tensor_cores"]


def test_small_groups_of_query_heads_use_the_plain_decode_kernel(flashinfer, wrappers):
    run(flashinfer, DECODES, shape=LayerShape(4, 2, 64))
    assert not wrappers[0].options["use_tensor_cores"]


def test_a_head_size_without_kernels_is_an_error(flashinfer):
    with pytest.raises(ValueError, match="heads of 48"):
        run(flashinfer, DECODES, shape=LayerShape(4, 2, 48))


def static_step(size, **options):
    one = np.ones(size, np.int32)
    host = HostIndex(size, one, one, np.full((size, 1), 20, np.int32), 640 * one)
    step = PagedStep.of(host, to_device(host.arrays(), CPU))
    values = {name: getattr(step, name) for name in PagedStep.__dataclass_fields__}
    return PagedStep(**values | {"is_static": True} | options)


def test_a_static_step_has_wrappers_of_its_own_and_every_replay_plans_them(flashinfer, wrappers):
    cache = PagedKVCache([SHAPE], 20, flashinfer, CPU, torch.bfloat16)
    step, (q, k, v) = static_step(4), (torch.zeros(1, n, 4, 64).bfloat16() for n in (8, 2, 2))
    flashinfer.plan(step)
    with cache.use(step):
        for _ in range(2):  # warm-up and capture
            cache.layers[0](q, k, v, 0.125, 0, 0.0)
    (wrapper,) = wrappers
    assert len(wrapper.plans) == 1
    options = wrapper.options
    assert options["use_cuda_graph"]
    assert options["paged_kv_indptr_buffer"].shape == (5,)
    assert options["paged_kv_last_page_len_buffer"].shape == (4,)
    assert options["paged_kv_indices_buffer"].shape[0] >= 20 + 4
    host = HostIndex.of([*DECODES, *DECODES], 32)
    flashinfer.plan(static_step(4, host=host))
    assert wrapper.plans[1]["indices"].tolist() == [4, 9, 7, 0, 5] * 2
    flashinfer.plan(static_step(2))  # a size that was never captured
    assert len(wrapper.plans) == 2


def test_flashinfer_has_no_fp32(wrappers):
    with pytest.raises(ValueError, match="no float32"):
        FlashInferAttention(CPU, torch.float32)


# -- torch varlen ------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """Answers varlen_attn by the formula's twin and keeps what it was called with."""
    from torch.nn.attention import varlen

    kept = []

    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size,
                    enable_gqa, seqused_k, block_table, num_splits):  # fmt: skip
        kept.append(dict(locals()))
        return torch.zeros_like(query)

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    return kept


def test_varlen_is_called_with_pages_lengths_and_no_splits(calls):
    attention = VarlenAttention(torch.bfloat16)
    segments = [Segment(0, 1, 300, [4, 2]), Segment(1, 5, 0, [3])]
    cache, (q, _, _), _ = run(attention, segments)
    (call,) = calls
    assert call["num_splits"] == 1
    assert call["enable_gqa"]
    assert call["key"] is cache.layers[0].keys
    assert call["key"].shape == (21, 256, 2, 64)
    assert torch.equal(call["query"], q[0].transpose(0, 1))
    assert call["cu_seq_q"].tolist() == [0, 1, 6]
    assert call["cu_seq_k"].tolist() == [0, 301, 306]
    assert call["seqused_k"].tolist() == [301, 5]
    assert call["block_table"].tolist() == [[4, 2], [3, 0]]
    names = ("cu_seq_q", "cu_seq_k", "seqused_k", "block_table")
    assert {call[k].dtype for k in names} == {torch.int32}
    assert all(call[k].is_contiguous() for k in names)
    assert (call["max_q"], call["max_k"], call["scale"]) == (5, 301, 0.125)
    assert call["window_size"] == (-1, 0)


def test_decodes_alone_are_not_called_causal(calls):
    run(VarlenAttention(torch.bfloat16), [Segment(0, 1, 30, [4]), Segment(1, 1, 3, [1])])
    assert calls[0]["window_size"] == (-1, -1)


def test_a_window_counts_the_keys_beside_a_rows_own(calls):
    run(VarlenAttention(torch.bfloat16), [Segment(0, 4, 30, [4])], [(20, 0.0)])
    assert calls[0]["window_size"] == (19, 0)


def test_a_soft_cap_which_varlen_has_not_is_computed_by_torch(calls):
    segments = [Segment(0, 4, 0, [4])]
    torch.manual_seed(0)
    _, _, (got,) = run(VarlenAttention(torch.bfloat16), segments, [(0, 5.0)])
    torch.manual_seed(0)
    _, _, (want,) = run(TorchAttention(), segments, [(0, 5.0)])
    assert not calls
    assert torch.equal(got, want)


def test_varlen_has_no_fp32():
    with pytest.raises(ValueError, match="no float32"):
        VarlenAttention(torch.float32)


def test_the_installed_varlen_attn_takes_what_we_pass(calls, monkeypatch):
    import inspect

    monkeypatch.undo()
    from torch.nn.attention.varlen import varlen_attn

    run_names = {"scale", "window_size", "enable_gqa", "seqused_k", "block_table", "num_splits"}
    parameters = inspect.signature(varlen_attn).parameters
    assert list(parameters)[:7] == [
        "query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k",
    ]  # fmt: skip
    assert run_names <= parameters.keys()
