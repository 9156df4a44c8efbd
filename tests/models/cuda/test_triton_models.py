"""A model fused by Triton kernels equals plain transformers, run by Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F
from models.cuda.device_rig import Stepper, launches_anew
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from redmux_adapters import editable_sites, ffn_sites, with_layer_norms
from redmux_adapters.bases.sites import LAYER_NORM
from redmux_server.engine.bank import AdapterBank
from redmux_server.engine.blocks import BlockPool
from redmux_server.models.causal.attention import attach, discover
from redmux_server.models.causal.selfcheck import _random_adapter
from redmux_server.models.cuda.decoder import FusedDeviceDecoder, HookedDecoder
from redmux_server.models.cuda.paged_cache import PagedKVCache
from redmux_server.models.cuda.row_edit import torch_edit
from redmux_server.models.cuda.runner import DeviceRunner, Graphs

TritonAttention = pytest.importorskip("redmux_server.models.cuda.paged_triton").TritonAttention
from redmux_server.models.cuda.triton_products import FewRowProducts  # noqa: E402
from redmux_server.models.cuda.triton_tiles import Device  # noqa: E402

CPU = torch.device("cpu")
SHAPE = {
    "vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 16,
    "max_position_embeddings": 128,
}  # fmt: skip
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),  # biases of q, k and v
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {}),  # norms of heads
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 4}),
}


def make_model(kind, **changes):
    cls, config, more = MODELS[kind]
    torch.manual_seed(0)
    model = cls(config(**SHAPE | more | changes)).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.data += torch.randn_like(parameter) * (0.3 if "norm" in name else 0.1)
    return model


class Rig(Stepper):
    """The fused model behind a DeviceRunner whose decode steps are computed in one way."""

    def __init__(self, model, way="separate kernels"):
        shapes, rules = discover(model)
        self.sites = with_layer_norms(editable_sites(model))
        self.cache = PagedKVCache(shapes, 12, TritonAttention(2), CPU, torch.float32)
        self.cache.poison(range(13), float("nan"))
        attach(model, self.cache)
        self.bank = AdapterBank(
            self.sites, device=CPU, dtype=torch.float32, max_bytes=0, min_slots=8,
            preallocated=True,
        )  # fmt: skip
        self.bank.reserve(ffn_sites(model))
        self.pool = BlockPool(12, self.cache.block_size)
        others = HookedDecoder(model, self.cache, torch_edit)
        eps = model.model.norm.variance_epsilon
        few_rows = FewRowProducts(24, eps, torch.float32, Device(2, 100_000, False))
        decoder = FusedDeviceDecoder(
            model, rules, self.cache, 128, others, {"few-row products": few_rows}
        )
        graphs = Graphs(launches_anew, 4, 4, frozenset({way}))
        self.runner = DeviceRunner(model, decoder, self.cache, self.bank, 1, graphs=graphs)


@torch.inference_mode()
def by_hand(model, ids, adapter):
    """Plain transformers' logits [tokens, vocab], the edit applied by hooks: scale * h + bias."""
    edits = {} if adapter is None else adapter.edits
    handles = [
        model.get_submodule(site.removesuffix(LAYER_NORM)).register_forward_hook(
            lambda module, args, h, e=edit, s=site: (
                F.layer_norm(h, h.shape[-1:], e.scale, e.bias)
                if s.endswith(LAYER_NORM)
                else h * e.scale + e.bias
            )
        )
        for site, edit in edits.items()
    ]
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    return logits


def run(rig, adapters):
    """Chunks, decodes beside chunks, decodes; returns requests and (request, row) pairs."""
    first, second, third = requests = [
        rig.request(range(3 + i, 10 + 3 * i), a) for i, a in enumerate(adapters)
    ]
    rows = [(first, rig.step((first, 7), (second, 4))[0])]
    rows += zip((second, third), rig.step((second, 5), (third, 11)), strict=True)
    ends = [len(r.token_ids) - 1 for r, _ in rows]
    for request, token in zip(requests, (9, 8, 7), strict=True):
        request.token_ids.append(token)
    rows += zip(requests, rig.step(*((r, 1) for r in requests)), strict=True)
    return [(r, row, i) for (r, row), i in zip(rows, ends * 2, strict=True)]


WAYS = ["separate kernels", "few-row products"]


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        pytest.param(kind, way, marks=[pytest.mark.slow] * (i % 2 != j and kind != "llama"))
        for i, kind in enumerate(MODELS)
        for j, way in enumerate(WAYS)
    ],
)
def test_mixed_steps_equal_plain_transformers(kind, way):
    plain, rig = make_model(kind), Rig(make_model(kind), way)
    linears = {site: dim for site, dim in rig.sites.items() if site.endswith("_proj")}
    ffn = {site: dim for site, dim in linears.items() if site.endswith("down_proj")}
    adapters = [None, _random_adapter(ffn, 1), _random_adapter(linears, 2)]
    for n, (request, row, end) in enumerate(run(rig, adapters)):
        right = by_hand(plain, request.token_ids[: end + 1 + n // 3], request.adapter)[-1]
        torch.testing.assert_close(row, right, rtol=2e-4, atol=2e-4)
    assert rig.runner.ways == f"{way} for 1, 2, 4 requests"


def test_sums_and_layer_norms_are_edited_as_in_plain_transformers():
    plain, rig = make_model("llama"), Rig(make_model("llama"), "few-row products")
    sums = {site: dim for site, dim in rig.sites.items() if site.split(".")[-1].isdigit()}
    ffn = [site for site in rig.sites if site.endswith("down_proj")]
    norms = {site + end: 24 for site in ffn for end in ("", LAYER_NORM)}  # behind the edit
    assert len(sums) == len(ffn) == 2
    adapters = [None, _random_adapter(sums, 1), _random_adapter(norms, 2)]
    for n, (request, row, end) in enumerate(run(rig, adapters)):
        right = by_hand(plain, request.token_ids[: end + 1 + n // 3], request.adapter)[-1]
        torch.testing.assert_close(row, right, rtol=2e-4, atol=2e-4)
