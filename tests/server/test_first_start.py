"""What only a first start has to do, begun beside the loading or before it."""

import sys

import pytest

import redmux_server.models.load
from redmux_server import cli, first_start
from redmux_server.config import ServerConfig


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """Returns the arguments of the processes that are started, on a CPU without kept kernels."""
    started = []

    class Process:
        def __init__(self, command, **_):
            started.append(command[1:])

        def wait(self):
            pass

    monkeypatch.setattr(first_start.subprocess, "Popen", Process)
    monkeypatch.setattr(first_start, "_GPU", tmp_path / "no such device")
    monkeypatch.setattr(first_start, "kernels_folder", lambda _: tmp_path)
    return started


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        ({}, ["fp32:float32"]),
        ({"quantization": "int8"}, ["fp32:float32", "int8:bfloat16"]),
        ({"kv_dtype": "bfloat16"}, ["fp32:float32", "fp32:bfloat16"]),
        ({"device": "cpu"}, ["fp32:float32"]),
    ],
    ids=str,
)
def test_kernels_are_compiled_beside_the_first_loading(begun, options, passes):
    first_start.compile_ahead(ServerConfig(**options))
    assert begun == [["-m", "redmux_server.models.cpu.ahead", "smollm2", *passes]]


@pytest.mark.parametrize("options", [{"device": "cuda"}, {"dtype": "bfloat16"}], ids=str)
def test_nothing_is_compiled_ahead_for_models_without_these_kernels(begun, options):
    first_start.compile_ahead(ServerConfig(**options))
    assert begun == []


def test_nothing_is_compiled_ahead_where_kernels_are_kept_or_a_gpu_is(begun, tmp_path, monkeypatch):
    (tmp_path / "decoder_pass.run.0123.nbc").write_text("")
    first_start.compile_ahead(ServerConfig())
    (tmp_path / "decoder_pass.run.0123.nbc").unlink()
    monkeypatch.setattr(first_start, "_GPU", tmp_path)
    first_start.compile_ahead(ServerConfig())
    assert begun == []


def test_warm_up_loads_the_model_as_serve_would_and_tells_where_it_is_kept(
    tiny_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("REDMUX_CACHE", str(tmp_path))
    monkeypatch.setattr(cli, "_import_app", lambda config: None)
    loaded = []
    monkeypatch.setattr(
        redmux_server.models.load, "load", lambda config, choices: loaded.append(config)
    )
    assert cli.warm_up(["--model", str(tiny_folder), "--quantization", "int8"]) == 0
    (config,) = loaded
    assert (config.model, config.quantization) == (str(tiny_folder), "int8")
    assert str(tmp_path) in capsys.readouterr().out


def test_warm_up_of_no_model_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "_import_app", lambda config: None)
    assert cli.warm_up(["--model", str(tmp_path / "no.gguf")]) == 1
    assert capsys.readouterr().err.startswith("redmux warm-up: ")


def test_a_process_that_compiles_ahead_ends_with_the_one_that_started_it(tmp_path):
    import subprocess

    code = "from redmux_server.models.cpu import ahead; ahead._end_with_stdin()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    process.stdin.close()
    assert process.wait() == 0
