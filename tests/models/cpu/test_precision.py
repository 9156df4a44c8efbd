"""Which products a quantization stands for on a CPU, and the reason that is told."""

import numba
import pytest
import torch

from redmux.errors import FailedPreconditionError
from redmux_server.config import ServerConfig
from redmux_server.device import choose
from redmux_server.models.cpu import precision
from redmux_server.models.load_causal import load_causal


@pytest.fixture
def on(monkeypatch):
    """Chooses as on another CPU."""

    def chosen(
        quantization,
        refusal=None,
        has_bf16=True,
        cpu="sapphirerapids",
        is_fp32=True,
        is_on_grids=False,
    ):
        monkeypatch.setattr(precision, "why_no_tiles", lambda: refusal)
        monkeypatch.setattr(precision, "HAS_AVX2", True)
        monkeypatch.setattr(precision, "HAS_BF16", has_bf16)
        monkeypatch.setattr(numba.config, "CPU_NAME", cpu)
        return precision.choose_precision(quantization, is_fp32, lambda: is_on_grids)

    return chosen


def test_nothing_is_quantized_and_nothing_said_unless_asked_for(on):
    assert on("none") == ("none", [])


def test_what_is_set_is_taken_and_tiles_are_told(on):
    name, reasons = on("int8", refusal="the system refuses AMX: why")
    assert name == "int8"
    assert reasons == [
        "quantization int8 (set by configuration)",
        "tiles: none, the system refuses AMX: why",
    ]
    assert on("bf16")[1][1] == "tiles: AMX"


@pytest.mark.parametrize(
    ("cpu", "expected", "reason"),
    [
        ({}, "bf16", "auto: in tiles the fastest within 1 % of perplexity"),
        ({"refusal": "no"}, "none", "auto: without tiles fp32 is the fastest within 1 %"),
        ({"refusal": "no", "cpu": "znver5"}, "bf16", "auto: this CPU's vectors of it are"),
        ({"refusal": "no", "cpu": "znver3", "has_bf16": False}, "none", "without tiles fp32"),
        (
            {"refusal": "no", "is_on_grids": True},
            "int4",
            "auto: without tiles 4-bit weights, which the model has, are the fastest within 1 %",
        ),
        ({"is_on_grids": True}, "bf16", "auto: in tiles the fastest within 1 % of perplexity"),
        ({"is_fp32": False}, "none", "auto: only products of fp32 are quantized"),
    ],
    ids=str,
)
def test_auto_is_the_fastest_within_the_stated_loss(on, cpu, expected, reason):
    name, reasons = on("auto", **cpu)
    assert name == expected
    assert reason in reasons[0]


@pytest.mark.parametrize(
    ("kv_dtype", "quantization", "dtype", "expected", "reason"),
    [
        ("auto", "none", "float32", "float32", "auto: as the rest"),
        ("auto", "int8", "float32", "bfloat16", "auto: products are rounded, too"),
        ("auto", "none", "float16", "float16", "auto: as the rest"),
        ("float32", "bf16", "float32", "float32", "set by configuration"),
        ("bfloat16", "none", "float32", "bfloat16", "set by configuration"),
    ],
)
def test_keys_and_values_are_rounded_where_products_are(
    kv_dtype, quantization, dtype, expected, reason
):
    got, why = precision.choose_kv_dtype(kv_dtype, quantization, dtype)
    assert got == expected
    assert why.startswith(f"keys and values {expected} ")
    assert reason in why


@pytest.mark.parametrize("options", [{"quantization": "int8"}, {"kv_dtype": "bfloat16"}], ids=str)
def test_what_only_decoders_round_is_refused_for_others(options):
    precision.check_not_rounded(ServerConfig(), "an encoder")
    with pytest.raises(FailedPreconditionError, match=r"which serves decoders; use .* for an enc"):
        precision.check_not_rounded(ServerConfig(**options), "an encoder")


def test_keys_of_another_dtype_than_the_models_are_refused_where_nothing_rounds_them():
    config = ServerConfig(device="cpu", dtype="bfloat16", kv_dtype="float32")
    with pytest.raises(FailedPreconditionError, match="kv_dtype is float32, which needs device cp"):
        choose(config)
    choose(ServerConfig(device="cpu", dtype="bfloat16", kv_dtype="bfloat16"))


def test_a_server_tells_what_auto_chose(tiny_folder):
    threads = torch.get_num_threads()
    config = ServerConfig(model=str(tiny_folder), kv_cache_tokens=1024, quantization="auto")
    loaded = load_causal(config, choose(config))
    torch.set_num_threads(threads)
    expected, reasons = precision.choose_precision("auto", True, lambda: False)
    packed = {linear.packing.precision for linear in loaded.linears}
    assert packed == {"fp32" if expected == "none" else expected}
    assert set(reasons) <= set(loaded.reasons)


def test_auto_with_another_dtype_quantizes_nothing(tiny_folder):
    config = ServerConfig(
        model=str(tiny_folder), kv_cache_tokens=1024, quantization="auto", dtype="bfloat16"
    )
    loaded = load_causal(config, choose(config))
    assert "quantization none (auto: only products of fp32 are quantized)" in loaded.reasons
