"""Kernels are compiled once, and again when anything that they are made of has changed."""

import ast
import importlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import redmux_server
from redmux_server.models.cpu import kept_code

PACKAGE = Path(redmux_server.__file__).parent
WING = PACKAGE / "models" / "cpu"
# Prints a value that a kernel gives, and how often it was compiled and found.
VALUE = """
import numpy as np
{call}
stats = kernel.stats
print(float(value), sum(stats.cache_misses.values()), sum(stats.cache_hits.values()))
"""
GATE = VALUE.format(
    call="""
from redmux_server.models.cpu.row_kernels import _gate_row as kernel
out = np.empty(2, np.float32)
kernel(np.ones(4, np.float32), out)
value = out[0]
"""
)
SMALL = VALUE.format(
    call="""
from redmux_server.models.cpu.phases import num_threads_of as kernel
value = kernel(np.ones((2, 3, 8), np.int64))
"""
)


@pytest.fixture
def gate(tmp_path):
    """Runs a kernel in a process of its own, on a copy of the server's sources."""
    ignored = shutil.ignore_patterns("__pycache__")
    copy = shutil.copytree(PACKAGE, tmp_path / "src" / "redmux_server", ignore=ignored)
    path = os.pathsep.join([str(tmp_path / "src"), *sys.path])
    environment = os.environ | {"PYTHONPATH": path, "REDMUX_CACHE": str(tmp_path / "cache")}

    def run(code=GATE):
        result = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        value, *counts = result.stdout.split()
        return float(value), *map(int, counts)

    run.sources = copy / "models" / "cpu"
    run.cache = tmp_path / "cache" / "kernels"
    return run


def silu_of_one(factor=1):
    return 1 / (1 + factor * np.exp(-1))


def test_a_kernel_is_compiled_again_when_what_it_calls_in_another_module_has_changed(gate):
    first, misses, hits = gate()
    assert (misses, hits) == (1, 0)
    assert first == pytest.approx(silu_of_one(), rel=1e-6)
    assert gate() == (first, 0, 1)
    other = gate.sources / "vector.py"
    source = other.read_text()
    assert source.count("    return y * np.int32(") == 1
    other.write_text(source.replace("    return y * np.int32(", "    return 2 * y * np.int32("))
    second, misses, hits = gate()
    assert (misses, hits) == (1, 0)
    assert second == pytest.approx(silu_of_one(2), rel=1e-6)


def test_machine_code_that_is_broken_or_cannot_be_kept_only_costs_time(gate):
    first = gate(SMALL)
    for path in gate.cache.rglob("*.nb?"):
        path.write_bytes(path.read_bytes()[:40])
    assert gate(SMALL) == first
    assert gate(SMALL) == (first[0], 0, 1)  # mended
    shutil.rmtree(gate.cache)
    gate.cache.write_text("a file where the folder should be")
    assert gate(SMALL) == first


def test_every_number_that_machine_code_takes_from_elsewhere_is_part_of_its_key():
    """numba writes the values of globals into machine code, and does not look at them again."""
    watched = {f"redmux_server.models.{name.removesuffix('.py')}" for name in kept_code.BELOW}
    for path in WING.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or not node.module.startswith("redmux"):
                continue
            if node.module.startswith("redmux_server.models.cpu") or node.module in watched:
                continue
            module = importlib.import_module(node.module)
            for alias in node.names:
                value = getattr(module, alias.name)
                assert not isinstance(value, int | float | np.generic | np.ndarray), (
                    f"{path.name} imports {alias.name}: add its module to BELOW"
                )


def test_kernels_of_sources_that_nobody_uses_any_more_go(tmp_path, monkeypatch):
    monkeypatch.setenv("REDMUX_CACHE", str(tmp_path))
    old, new = tmp_path / "kernels" / "old", tmp_path / "kernels" / "new"
    for folder in (old, new):
        folder.mkdir(parents=True)
    long_ago_s = time.time() - 40 * 86400
    os.utime(old, (long_ago_s, long_ago_s))
    kept_code.folder.cache_clear()
    kept_code.make_room.cache_clear()
    kept_code.make_room()
    kept_code.folder.cache_clear()
    assert not old.exists()
    assert new.exists()
