"""Everything that a pass reads and writes starts at a cache line, which changes no bit."""

import numpy as np
import pytest
import torch
from conftest import save_tiny_model
from transformers import AutoConfig

from redmux_adapters import Adapter, Edit, editable_sites
from redmux_adapters.bases.load import load_base
from redmux_server.config import ServerConfig
from redmux_server.device import choose
from redmux_server.engine.blocks import BlockPool
from redmux_server.engine.request import Request, SamplingParams, Work
from redmux_server.models.cpu import aligned, fused_decoder
from redmux_server.models.cpu.arithmetic import HAS_AVX2, HAS_BF16
from redmux_server.models.cpu.packed_linear import packed_linear
from redmux_server.models.cpu.sequence_attention import Panels
from redmux_server.models.kvcache import BLOCK
from redmux_server.models.load_causal import load_causal

# Sizes that are no whole lines, in any precision.
SHAPE = {
    "vocab_size": 260, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    "hidden_size": 54, "intermediate_size": 70, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 20, "max_position_embeddings": 256,
}  # fmt: skip
SLOW = pytest.mark.slow  # kernels of another precision take a minute to compile
PRECISIONS = [
    "fp32",
    *[pytest.param("int4", marks=SLOW), pytest.param("int8", marks=SLOW)] * HAS_AVX2,
    *[pytest.param("bf16", marks=SLOW)] * HAS_BF16,
]


def offset(array):
    return aligned.address(array) % aligned.LINE


@pytest.mark.parametrize("behind", [0, 16])
@pytest.mark.parametrize("dtype", [np.float32, np.uint16, np.uint8, np.int64])
@pytest.mark.parametrize("shape", [7, (3, 5), (1, 300, 2)])
def test_arrays_start_where_they_are_asked_to(shape, dtype, behind):
    array = aligned.zeros(shape, dtype, behind)
    assert array.shape == np.zeros(shape).shape
    assert array.dtype == dtype
    assert array.flags.c_contiguous
    assert not array.any()
    assert offset(array) == behind


def test_spare_rows_behind_the_last_one_are_there():
    array = aligned.rows(3, 8, np.float32)
    assert array.shape == (3, 8)
    assert array.base.size >= (3 + aligned.SPARE_ROWS) * 8 * 4


def test_an_array_at_a_line_is_left_where_it_is_and_another_is_copied():
    array = aligned.zeros((4, 6), np.float32)
    array[...] = np.arange(24).reshape(4, 6)
    assert aligned.at_line(array) is array
    for other in (array[:, :5], array[1:], array.T):
        copy = aligned.at_line(other)
        assert offset(copy) == 0
        assert copy.flags.c_contiguous
        assert np.array_equal(copy, other)


def test_room_of_compiled_code_starts_at_a_line_and_outlives_its_call():
    rooms = [aligned.scratch(size) for size in range(60)]
    for size, room in enumerate(rooms):
        assert (room.size, room.dtype, offset(room)) == (size, np.float32, 0)
        room[...] = size
    assert all((room == size).all() for size, room in enumerate(rooms))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("size", "out"), [(33, 7), (576, 96), (8192, 40)])
def test_products_have_the_same_bits_wherever_their_arrays_start(size, out, precision):
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(out, size, generator=generator), torch.randn(out)
    x = torch.randn(40, size, generator=generator)
    want = packed_linear(weight, bias, precision)(x)
    linear = packed_linear(weight, bias, precision)
    packed = linear.packing.packed
    copies = {
        name: aligned.copied(array, 16)
        for name, array in packed._asdict().items()
        if isinstance(array, np.ndarray)
    }
    linear.packing.packed = packed._replace(**copies)
    moved = torch.from_numpy(aligned.copied(x.numpy(), 16))
    assert torch.equal(linear(moved), want)


def test_panels_of_a_whole_sequence_start_at_a_line():
    panels = Panels(3, 20, 50)
    assert offset(panels._keys) == offset(panels._values) == 0


@pytest.fixture(params=PRECISIONS)
def passes(request, tmp_path, monkeypatch):
    """What each pass of a few steps with adapters got, and a function that runs such a pass."""
    folder = save_tiny_model(tmp_path, AutoConfig.for_model("llama", **SHAPE))
    quantization = "none" if request.param == "fp32" else request.param
    config = ServerConfig(model=str(folder), kv_cache_tokens=1024, quantization=quantization)
    threads = torch.get_num_threads()
    loaded = load_causal(config, choose(config))
    torch.set_num_threads(threads)
    got = []
    run = fused_decoder.run

    def noting(*arguments):
        got.append((arguments, [copied(part, 16) for part in arguments[1:]]))
        run(*arguments)

    monkeypatch.setattr(fused_decoder, "run", noting)
    plain, _ = load_base(str(folder))
    sites = editable_sites(plain)
    edits = {site: Edit(torch.full((dim,), 1.5), torch.ones(dim)) for site, dim in sites.items()}
    adapter = Adapter("base", edits)
    pool = BlockPool(loaded.num_blocks, BLOCK)
    requests = []
    for length in (5, 37, 70):
        made = Request(
            prompt_ids=[(7 * i) % 250 + 5 for i in range(length)], max_tokens=8,
            sampling=SamplingParams(), stop_token_ids=frozenset(), tenant="", adapter=adapter,
            logprobs=False, sink=lambda event: None,
        )  # fmt: skip
        made.blocks = pool.allocate(made.max_length)
        made.slot = loaded.bank.acquire(adapter.digest, adapter.edits)
        requests.append(made)
    for counts in ((5, 20, 30), (0, 17, 40)):
        work = [Work(r, count) for r, count in zip(requests, counts, strict=True) if count]
        loaded.runner.forward(work)
        for item in work:
            item.request.num_computed += item.count
    assert len(got) == 2
    return got, run


def arrays(part):
    """Returns the arrays of a tuple by name, keys and values layer by layer."""
    found = {n: a for n, a in part._asdict().items() if isinstance(a, np.ndarray) and a.size}
    for name in {"keys", "values"} & found.keys():
        found |= {f"{name} of layer {i}": layer for i, layer in enumerate(found[name])}
    return found


def copied(part, behind):
    """Returns the tuple with a copy of each array, rows behind the last one included."""

    def copy(array):
        if not isinstance(array, np.ndarray):
            return array
        if array.ndim != 2:
            return aligned.copied(array, behind)
        new = aligned.rows(*array.shape, array.dtype, behind)
        new[...] = array
        return new

    fields = part._asdict()
    copies = {id(array): copy(array) for array in fields.values()}  # some are one array
    return part._replace(**{name: copies[id(array)] for name, array in fields.items()})


def test_all_that_a_pass_gets_starts_at_a_line(passes):
    for (_, *parts), _ in passes[0]:
        assert [type(part).__name__ for part in parts] == ["Step", "Model", "Packed", "Room"]
        for part in parts:
            assert {n: offset(a) for n, a in arrays(part).items() if offset(a)} == {}


def test_rounded_rows_are_whole_lines(passes):
    (_, _, _, _, room), _ = passes[0][0]
    for name in ("narrow_h", "narrow_attended", "narrow_gated", "picked"):
        narrow = getattr(room, name)
        if narrow.dtype != np.float32:
            assert narrow[0].nbytes % aligned.LINE == 0, name


def test_a_pass_gives_the_same_bits_wherever_its_arrays_start(passes):
    got, run = passes
    for (threads, step, _, _, _), moved in got:
        assert offset(moved[0].x) == offset(moved[1].keys) == offset(moved[3].h) == 16
        run(threads, *moved)
        assert step.logits.any()
        assert np.array_equal(moved[0].logits, step.logits)
    _, _, model, _, room = got[-1][0]  # what the last step has left
    count = len(moved[0].logits)
    assert np.array_equal(moved[3].h[:count], room.h[:count])
    assert np.array_equal(moved[1].keys, model.keys)
    assert np.array_equal(moved[1].values, model.values)
