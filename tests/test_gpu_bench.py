"""The script for the GPU runs from end to end on the CPU, and one broken part stops no other."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "bench" / "gpu"
MODULES = ("run", "checks", "timings", "products", "beside", "rig", "front_end")


@pytest.fixture
def run(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.syspath_prepend(FOLDER)
    import run

    yield run
    torch.set_num_threads(threads)
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of PEFT, where it is installed
def test_every_part_runs_on_a_tiny_model(run, tmp_path, capsys):
    assert run.main(["--cpu-smoke", "--out", str(tmp_path / "out.json")]) == 0
    parts = json.loads((tmp_path / "out.json").read_text())
    assert {p["status"] for p in parts.values()} <= {"ok", "skipped"}
    assert [name for name, p in parts.items() if p["status"] == "skipped"] in (
        [],
        ["time: PEFT, tiny"],
    )
    sweep, floors, prefills, reasons = parts["time: decode, tiny"]["result"]
    assert [row["adapters"] for row in sweep] == [0, 1, 4, 8]
    assert [row["batch"] for row in floors] == [1, 2, 4]
    assert all(row["step ms"] > 0 and row["floor ms"] > 0 for row in floors)
    assert [row["tokens"] for row in prefills] == [24, 96]
    assert reasons[0].startswith("attention: ")
    assert "failed: none" in capsys.readouterr().out


@pytest.mark.slow  # two processes start
def test_the_server_runs_beside_its_engine(run):
    front_end = sys.modules["front_end"]
    rows = front_end.measure("tiny", torch.device("cpu"), torch.float32, smoke=True)
    assert [row["streams"] for row in rows] == [4]
    assert rows[0]["engine_tokens_per_s"] > 0
    assert rows[0]["wire_tokens_per_s"] > 0


@pytest.mark.slow
def test_a_part_that_fails_is_reported_and_the_others_still_run(run, monkeypatch, tmp_path, capsys):
    def fail(*args):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(sys.modules["checks"], "edit_kernel", fail)
    monkeypatch.setattr(sys.modules["checks"], "tokens", lambda *args: [])
    out = tmp_path / "out.json"
    assert run.main(["--cpu-smoke", "--check-only", "--out", str(out)]) == 1
    parts = json.loads(out.read_text())
    assert parts["check: edits"]["status"] == "failed"
    assert parts["check: edits"]["error"] == "RuntimeError: no kernel"
    assert parts["check: tokens, float32"]["status"] == "ok"
    assert not any(name.startswith("time: ") for name in parts)
    assert "failed: check: edits" in capsys.readouterr().out


def test_without_a_gpu_it_says_so(run, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        run.main([])
    assert "no CUDA device" in capsys.readouterr().err


def test_a_wrong_edit_is_found(run, monkeypatch):
    checks = sys.modules["checks"]
    monkeypatch.setattr(checks, "torch_edit", lambda h, *step: h.mul_(1.01))
    with pytest.raises(AssertionError, match="is off by"):
        checks.edit_kernel(torch.device("cpu"), smoke=True)


def test_a_step_must_read_every_weight_and_key_once(run):
    rig, timings = sys.modules["rig"], sys.modules["timings"]
    model = rig.random_model("tiny", torch.device("cpu"), torch.float32)
    weights = 260 * 64 + 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96 + 2 * 64) + 64
    keys = 3 * 11 * 2 * 2 * 2 * 16  # requests, tokens, layers, keys and values, heads, size
    assert timings.step_bytes(model, 3, 10) == 4 * (weights + keys)


@pytest.mark.slow
def test_the_kernels_of_a_decode_step_compile_for_hopper_and_spill_no_register():
    pytest.importorskip("triton")
    command = [sys.executable, FOLDER / "compiled.py", "--shapes", "8b", "--rows", "16"]
    path = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    kernels = [line.split()[4] for line in done.stdout.splitlines() if line.split()[0] == "8b"]
    layer = ["project", "rotate", "attend", "join", "add", "gate", "add"]
    assert kernels == ["start", *layer] * 2
