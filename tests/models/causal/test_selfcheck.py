"""The check at start: it passes for a good engine and says so when something is not right."""

import contextlib

import pytest
import torch
from torch import nn

from redmux.errors import FailedPreconditionError
from redmux_adapters import editable_sites, load_base
from redmux_server.models.causal.attention import attach, attention_modules, discover
from redmux_server.models.causal.runner import CausalRunner, TransformersDecoder
from redmux_server.models.causal.selfcheck import MIN_CACHE_TOKENS, SelfCheck, reference
from redmux_server.models.causal.torch_kvcache import TorchKVCache
from redmux_server.models.cpu.accelerate import pack_linears
from redmux_server.models.cpu.kvcache import NumbaKVCache
from redmux_server.models.kvcache import BLOCK


class Rig:
    """A loaded model with its cache, as far as `load_causal` takes it before the check."""

    def __init__(self, folder, *, packs=True, kind="numba", num_blocks=24):
        self.model, _ = load_base(str(folder), torch.float32)
        self.sites = editable_sites(self.model)
        self.expected = reference(self.model)
        shapes, _ = discover(self.model)
        self.cache = (
            NumbaKVCache(shapes, num_blocks)
            if kind == "numba"
            else TorchKVCache(shapes, num_blocks, torch.device("cpu"), torch.float32)
        )
        attach(self.model, self.cache)
        if packs:
            pack_linears(self.model)

    @contextlib.contextmanager
    def check(self):
        threads = torch.get_num_threads()
        try:
            decoder, device = TransformersDecoder(self.model), torch.device("cpu")

            def make(bank):
                return CausalRunner(decoder, self.cache, bank, device, 2)

            with contextlib.closing(SelfCheck(make, self.sites, device, torch.float32)) as check:
                yield check
        finally:
            torch.set_num_threads(threads)

    def compare(self):
        with self.check() as check:
            check.compare(self.expected)

    def is_bit_identical(self):
        with self.check() as check:
            return check.is_bit_identical(self.expected.prompts)


@pytest.fixture
def rig(tiny_folder):
    return Rig(tiny_folder)


@pytest.fixture
def layer(rig):
    """The second layer's attention module."""
    return attention_modules(rig.model)[1]


@pytest.mark.parametrize("kind", ["numba", "torch"])
@pytest.mark.parametrize("packs", [True, False])
def test_a_good_engine_passes(tiny_folder, kind, packs):
    Rig(tiny_folder, kind=kind, packs=packs).compare()


def test_the_packed_exact_engine_is_bit_identical(rig):
    assert rig.is_bit_identical()


def test_another_attention_scale_is_found(rig, layer):
    layer.scaling *= 1.05
    with pytest.raises(FailedPreconditionError, match="differs from the plain model by"):
        rig.compare()


def test_a_window_that_the_model_has_not_is_found(rig, layer):
    inner = layer.redmux_attention
    layer.redmux_attention = lambda q, k, v, scale, window, softcap: inner(q, k, v, scale, 16, 0.0)
    with pytest.raises(FailedPreconditionError, match="differs"):
        rig.compare()


def test_a_changed_weight_is_found(rig):
    rig.model.model.norm.weight.data[0] += 1
    with pytest.raises(FailedPreconditionError, match="differs"):
        rig.compare()


def test_logits_that_are_not_finite_are_found(rig):
    rig.model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(FailedPreconditionError, match="differs"):
        rig.compare()


def test_a_term_that_depends_on_the_batch_is_not_bit_identical(rig):
    def hook(module, args, output):
        return output + 1e-3 * output.shape[1]

    module = rig.model.model.layers[0].mlp.down_proj
    handle = module.register_forward_hook(hook)
    assert not rig.is_bit_identical()
    handle.remove()


def test_a_term_that_depends_on_the_neighbours_is_not_bit_identical(rig):
    def hook(module, args, output):
        return output + 1e-3 * output.mean(1, keepdim=True)

    rig.model.model.layers[0].mlp.register_forward_hook(hook)
    assert not rig.is_bit_identical()


def test_one_bit_in_the_last_place_is_not_bit_identical(rig):
    def hook(module, args, output):
        return output.nextafter(torch.tensor(torch.inf)) if output.shape[-2] > 1 else output

    rig.model.lm_head.register_forward_hook(hook)
    assert not rig.is_bit_identical()


def test_a_term_that_depends_on_the_chunks_is_not_bit_identical(rig):
    def hook(module, args, output):
        for s in rig.cache.segments:
            output[0, s.start : s.start + s.count] *= 1 + s.count / 1000
        return output

    rig.model.model.layers[0].mlp.register_forward_hook(hook)
    assert not rig.is_bit_identical()


class _Variant(nn.Module):
    """A product whose last bits depend on whether there are many rows, as MKL's do."""

    def __init__(self, linear):
        super().__init__()
        self._linear = linear

    def forward(self, x):
        if x.shape[-2] == 1:
            return self._linear(x)
        return self._linear(x * (1 + 2**-20))


def test_a_product_that_depends_on_the_number_of_rows_is_not_bit_identical(rig):
    mlp = rig.model.model.layers[2].mlp
    mlp.down_proj = _Variant(mlp.down_proj)
    rig.compare()  # the difference is far below the tolerance
    assert not rig.is_bit_identical()


ROWS_MOVED = {
    "behind the fifth": lambda n: range(5, n),
    "the eighth": lambda n: range(7, min(n, 8)),
    "the first of each further eight": lambda n: range(8, n, 8),
    "the first of the second six": lambda n: range(6, min(n, 7)),
    "all of more than eight": lambda n: range(n if n > 8 else 0),
    "all of nine to fifteen": lambda n: range(n if 8 < n < 16 else 0),
    "those behind whole eights": lambda n: range(n // 8 * 8, n if n > 8 else 0),
    "those behind whole sixes": lambda n: range(n // 6 * 6, n if n > 6 else 0),
}


@pytest.mark.parametrize("where", ["layers.2.mlp.down_proj", "lm_head"])
def test_a_row_whose_bits_depend_on_where_it_stands_is_not_bit_identical(rig, where):
    """Of steps that decode, in the last layer: no later keys and values tell of it."""

    tried = []

    def hook(module, args, output):
        if where == "lm_head" or all(s.count == 1 for s in rig.cache.segments):
            for i in ROWS_MOVED[tried[-1]](output.shape[1]):
                output[0, i] = output[0, i].nextafter(torch.tensor(torch.inf))
        return output

    module = next(m for name, m in rig.model.named_modules() if name.endswith(where))
    module.register_forward_hook(hook)
    with rig.check() as check:
        for what in ROWS_MOVED:
            tried.append(what)
            assert not check.is_bit_identical(rig.expected.prompts), what


@pytest.mark.parametrize("method", ["compare", "is_bit_identical"])
def test_the_check_leaves_no_hook_on_the_model(rig, method):
    getattr(rig, method)()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in rig.model.modules())


def test_the_check_gives_its_blocks_and_slots_back(rig):
    with rig.check() as check:
        check.compare(rig.expected)
        check.is_bit_identical(rig.expected.prompts)
        assert check._pool.num_free == check._pool.num_blocks
        assert check._bank.num_uses == 0


def test_the_check_does_not_depend_on_what_the_cache_held(rig):
    rig.cache.poison(range(rig.cache.num_blocks), float("nan"))
    rig.compare()


def test_a_cache_too_small_for_the_check_is_refused_by_name(tiny_folder):
    with pytest.raises(FailedPreconditionError, match=f"too small: .* needs {MIN_CACHE_TOKENS}$"):
        Rig(tiny_folder, num_blocks=MIN_CACHE_TOKENS // BLOCK - 1).compare()


def test_the_check_runs_in_as_few_blocks_as_it_says(tiny_folder):
    Rig(tiny_folder, num_blocks=MIN_CACHE_TOKENS // BLOCK).compare()


def test_the_reference_is_the_same_every_time(tiny_folder):
    model, _ = load_base(str(tiny_folder), torch.float32)
    first, second = reference(model), reference(model)
    assert first.prompts == second.prompts
    assert all(map(torch.equal, first.logits, second.logits))
