"""Few-row products in an engine put together as for a GPU: taken if they are right and faster."""

import pytest
import torch
from models.cuda.device_rig import CPU, GraphableAttention, launches_anew
from models.cuda.test_triton_models import make_model

from redmux_adapters import editable_sites
from redmux_server.models.causal import selfcheck
from redmux_server.models.causal.attention import attach, discover
from redmux_server.models.cuda import few_rows, runtime
from redmux_server.models.cuda.paged_cache import PagedKVCache

products = pytest.importorskip("redmux_server.models.cuda.triton_products")
from redmux_server.models.cuda.triton_edit import triton_edit  # noqa: E402
from redmux_server.models.cuda.triton_tiles import Device  # noqa: E402

NAME = "few-row products"


class Wrong(products.FewRowProducts):
    def project(self, *args):
        return super().project(*args) * 1.5


class Failing(products.FewRowProducts):
    def gate(self, *args):
        raise ValueError("out of resource: shared memory")


@pytest.fixture
def assemble(monkeypatch):
    """Puts an engine together with this kind of few-row products, which takes so long a step."""

    def put_together(kind, share):
        monkeypatch.setattr(selfcheck, "_LENGTHS", (3, 2))
        monkeypatch.setattr(runtime, "CudaCapture", launches_anew)
        few = kind(24, 1e-6, torch.float32, Device(2, 100_000, False))
        monkeypatch.setattr(runtime, "few_row_products", lambda model: ({NAME: few}, None))
        times = []

        def seconds(replay):  # the first way of every size is timed first
            times.append(share if len(times) % 2 else 1.0)
            return times[-1]

        model = make_model("llama", num_hidden_layers=1)
        expected = selfcheck.reference(model)
        shapes, rules = discover(model)
        cache = PagedKVCache(shapes, 12, GraphableAttention(), CPU, torch.float32)
        attach(model, cache)
        chosen = runtime.DeviceRuntime(
            GraphableAttention(), triton_edit, CPU, torch.float32, 1, True, ("parts",), seconds
        )
        return chosen.assemble(
            model, rules, cache, editable_sites(model), expected,
            max_running=2, max_context=32, bank_bytes=0,
        )  # fmt: skip

    return put_together


GRAPHS = "decode steps: CUDA graphs, one per batch size"


def test_they_serve_the_sizes_at_which_they_are_faster(assemble):
    faster = assemble(products.FewRowProducts, 0.8)
    gain = f"{NAME} for 1, 2 requests (0.80 to 0.80 of the time of separate kernels)"
    assert faster.reasons == ("parts", "layers: fused by Triton", f"{GRAPHS}, {gain}")
    assert not faster.bit_identical  # decodes alone and prefills are not the same products


def test_they_serve_no_size_at_which_they_are_slower(assemble):
    slower = assemble(products.FewRowProducts, 1.1)
    assert slower.reasons[-1] == f"{GRAPHS}, separate kernels for 1, 2 requests"


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Wrong, "FailedPreconditionError: the packed engine differs from the plain model"),
        (Failing, "ValueError: out of resource: shared memory"),
    ],
)
def test_what_is_wrong_or_fails_is_left_out_with_its_reason(kind, why, assemble):
    engine = assemble(kind, 0.5)
    *_, graphs, refused = engine.reasons
    assert graphs == GRAPHS
    assert refused.startswith(f"not used: {NAME}: {why}")


class TestKinds:
    """What a model can have on a device."""

    @pytest.fixture
    def device(self, monkeypatch):
        def use(launches_early):
            device = Device(132, 232448, launches_early)
            monkeypatch.setattr(Device, "of", staticmethod(lambda _: device))

        return use

    def test_a_device_that_can_gets_early_launches_too(self, device):
        device(False)
        kinds, why_not = few_rows.few_row_products(make_model("llama"))
        assert (list(kinds), why_not) == ([NAME], None)
        device(True)
        kinds, why_not = few_rows.few_row_products(make_model("llama"))
        assert (list(kinds), why_not) == ([NAME, f"{NAME} launched early"], None)

    def test_norms_that_may_overflow_fp16_get_none(self, device):
        device(False)
        model = make_model("llama").half()
        assert few_rows.few_row_products(model)[0]
        model.model.layers[1].post_attention_layernorm.weight[3] = -40
        kinds, why_not = few_rows.few_row_products(model)
        assert not kinds
        assert why_not == "weights of its norms are over 32, which may overflow fp16"
