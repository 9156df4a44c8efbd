"""Products in tiles: the same bits as vectors in int8, their own in bf16, or not at all."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from redmux_server.config import ServerConfig
from redmux_server.device import choose
from redmux_server.models.cpu import aligned, packed_linear, packing, precision, tile_permission
from redmux_server.models.cpu.arithmetic import HAS_AVX2, HAS_BF16
from redmux_server.models.load_causal import load_causal

needs_tiles = pytest.mark.skipif(
    tile_permission.why_no_tiles() is not None, reason=f"tiles: {tile_permission.why_no_tiles()}"
)
needs_int8 = pytest.mark.skipif(not HAS_AVX2, reason="int8 needs AVX2")
needs_bf16 = pytest.mark.skipif(not HAS_BF16, reason="this CPU has no products of bf16")

# (in_features, out_features): narrower than a tile, odd, whole parts, wide, and deep.
SHAPES = [(1, 1), (33, 7), (63, 33), (64, 32), (65, 100), (576, 192), (1536, 65), (8192, 40)]
ROWS = (1, 2, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 64, 100, 127, 128, 129, 136, 143, 144, 260)
REFUSED = "the system refuses AMX: Operation not permitted"


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def in_vectors(linear):
    """Returns the same layer with its products in vectors."""
    packed = linear.packing.packed
    linear.packing.packed = packed._replace(tiles=None)
    return linear


@needs_tiles
@pytest.mark.parametrize(("size", "out"), SHAPES)
def test_int8_has_the_same_bits_in_tiles_and_in_vectors(size, out):
    weight, bias = randn(out, size), randn(out, seed=1)
    tiles = packed_linear.packed_linear(weight, bias, "int8")
    vectors = in_vectors(packed_linear.packed_linear(weight, bias, "int8"))
    assert tiles.packing.packed.tiles is not None
    for rows in ROWS:
        x = randn(rows, size, seed=rows)
        x[rows // 2] *= 1000
        assert torch.equal(tiles(x), vectors(x)), rows


@needs_tiles
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3e38])
@pytest.mark.parametrize("name", ["int8", "bf16"])
def test_what_a_row_holds_changes_no_bit_of_the_others_in_its_tile(name, value):
    linear, x = packed_linear.packed_linear(randn(40, 100), None, name), randn(20, 100, seed=2)
    quiet = linear(x)
    x[3], x[17] = value, -value
    others = [row for row in range(20) if row not in (3, 17)]
    assert torch.equal(linear(x)[others], quiet[others])


@needs_tiles
@pytest.mark.parametrize("name", ["int8", "bf16"])
def test_what_lies_behind_the_last_row_changes_no_bit(monkeypatch, name):
    linear, x = packed_linear.packed_linear(randn(40, 100), None, name), randn(9, 100, seed=2)
    want = linear(x)

    def full(num, width, dtype):
        array = aligned.zeros((num + aligned.SPARE_ROWS, width), dtype)
        array[num:] = 127 if dtype == np.uint8 else 0x7FC0 if dtype == np.uint16 else np.nan
        return array[:num]

    monkeypatch.setattr(packed_linear.aligned, "rows", full)
    assert torch.equal(linear(x), want)


@needs_bf16
@pytest.mark.parametrize(("size", "out"), SHAPES)
def test_bf16_in_vectors_has_the_same_bits_in_any_company(size, out):
    """Where tiles are refused; with them this is `test_quantized`'s."""
    linear = in_vectors(packed_linear.packed_linear(randn(out, size), randn(out), "bf16"))
    x = randn(70, size, seed=2)
    whole = linear(x)
    for rows in range(1, 70, 3):
        assert torch.equal(linear(x[:rows]), whole[:rows]), rows


@needs_tiles
@pytest.mark.parametrize(("size", "out"), SHAPES)
def test_bf16_differs_between_tiles_and_vectors_by_roundings_of_sums_alone(size, out):
    weight, x = randn(out, size), randn(40, size, seed=2)
    tiles = packed_linear.packed_linear(weight, None, "bf16")(x)
    vectors = in_vectors(packed_linear.packed_linear(weight, None, "bf16"))(x)
    torch.testing.assert_close(tiles, vectors, rtol=0, atol=2e-5 * size**0.5)


@pytest.fixture
def ask(monkeypatch):
    """Asks as on a CPU with AMX, whose system answers as told."""

    def asked(request, permitted=0, query=0, platform="linux"):
        def prctl(code, argument):
            if code == tile_permission._REQUEST_PERMISSION:
                assert argument.value == 18
                return request
            argument._obj.value = permitted
            return query

        monkeypatch.setattr(tile_permission, "HAS_TILES", True)
        monkeypatch.setattr(tile_permission.sys, "platform", platform)
        monkeypatch.setattr(tile_permission, "_arch_prctl", prctl)
        return tile_permission.why_no_tiles.__wrapped__()

    return asked


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({"request": 0, "permitted": 1 << 18 | 0x7}, None),
        ({"request": 1}, REFUSED),
        ({"request": 22}, "the system refuses AMX: Invalid argument"),
        ({"request": 0, "query": 22}, "the system refuses AMX: Invalid argument"),
        ({"request": 0, "permitted": 0x7}, "the system has not granted AMX"),
        ({"request": 0, "platform": "darwin"}, "not known how to ask darwin for them"),
    ],
    ids=str,
)
def test_tiles_are_used_where_the_system_grants_them(ask, answer, reason):
    assert ask(**answer) == reason


def test_a_cpu_without_them_is_not_asked_for_tiles(ask, monkeypatch):
    monkeypatch.setattr(tile_permission, "_arch_prctl", None)
    monkeypatch.setattr(tile_permission, "HAS_TILES", False)
    assert "no AMX" in tile_permission.why_no_tiles.__wrapped__()


@pytest.mark.parametrize("name", ["int8", pytest.param("bf16", marks=needs_bf16)])
@needs_int8
def test_a_server_whose_tiles_are_refused_multiplies_in_vectors_and_says_why(
    tiny_folder, monkeypatch, name
):
    for module in (packing, precision):
        monkeypatch.setattr(module, "why_no_tiles", lambda: REFUSED)
    threads = torch.get_num_threads()
    config = ServerConfig(model=str(tiny_folder), kv_cache_tokens=1024, quantization=name)
    loaded = load_causal(config, choose(config))
    torch.set_num_threads(threads)
    assert loaded.linears[0].packing.packed.tiles is None
    assert loaded.bit_identical
    assert f"tiles: none, {REFUSED}" in loaded.reasons


# In a process of its own: a filter is for good, and threads must not have started at a fork.
REFUSE = """
import ctypes, struct
def refuse(number):
    "Answers arch_prctl with this error by a filter of system calls; 0 is a success that is none."
    is_it, otherwise = (0x15, 0, 1, 158), (0x06, 0, 0, 0x7FFF0000)
    lines = [(0x20, 0, 0, 0), is_it, (0x06, 0, 0, 0x50000 | number), otherwise]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))
    program = struct.pack("HxxxxxxP", len(lines), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.prctl(22, 2, ctypes.create_string_buffer(program)) == 0
"""
MULTIPLY = """
import hashlib, torch
from redmux_server.models.cpu.packed_linear import packed_linear
from redmux_server.models.cpu.tile_permission import why_no_tiles
def digest(precision):
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(n, 100, generator=generator) for n in (40, 20))
    return hashlib.sha256(packed_linear(weight, None, precision)(x).numpy()).hexdigest()
"""


def output_of(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split("\n")


@pytest.mark.skipif(sys.platform != "linux", reason="system calls are filtered on Linux")
@needs_int8
@pytest.mark.parametrize("error", [1, 0])
def test_a_filter_of_system_calls_leaves_the_products_in_vectors(error):
    """Containers may run under one that refuses arch_prctl, or says that it was done."""
    said, digest, *_ = output_of(
        f"{REFUSE}\nrefuse({error})\n{MULTIPLY}\nprint(why_no_tiles())\nprint(digest('int8'))"
    )
    assert said.startswith(("this CPU has no AMX", REFUSED if error else "the system has not"))
    assert digest == output_of(f"{MULTIPLY}\nprint(digest('int8'))")[0]


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux")
@needs_int8
@pytest.mark.parametrize("name", ["int8", pytest.param("bf16", marks=needs_bf16)])
def test_a_forked_child_multiplies_with_the_same_bits(name):
    ours, theirs, *_ = output_of(
        f"{MULTIPLY}\nimport os\nwhy_no_tiles()\npid = os.fork()\n"
        f"if pid == 0:\n    print(digest({name!r}), flush=True)\n    os._exit(0)\n"
        f"assert os.waitpid(pid, 0)[1] == 0\nprint(digest({name!r}))"
    )
    assert ours == theirs
