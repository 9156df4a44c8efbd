"""Machine code is made once for a whole tree of kernels, and compiled by one process at a time."""

import ast
import fcntl
import os
import threading
from pathlib import Path

import numba
import pytest

import redmux_server
from redmux_server.models.cpu import kept_code, machine_code
from redmux_server.models.cpu.compiled import compiled

WING = Path(redmux_server.__file__).parent / "models" / "cpu"


@compiled
def inner(x):
    if x < 0:
        raise ValueError("below zero")
    return 2 * x


@compiled
def middle(x):
    return inner(x) + 1


@compiled
def outer(x):
    return middle(x) + inner(x)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and kernels that nobody has called."""
    monkeypatch.setenv("REDMUX_CACHE", str(tmp_path))
    kept_code.folder.cache_clear()
    for kernel in (inner, middle, outer):
        kernel._reset_overloads()
    yield kept_code.folder()
    kept_code.folder.cache_clear()


def test_only_what_python_calls_becomes_machine_code_and_parts_can_be_called_later(cache):
    assert outer(3) == 13
    int64 = (numba.types.int64,)
    assert machine_code.is_assembled(outer.overloads[int64])
    for part in (inner, middle):
        assert not machine_code.is_assembled(part.overloads[int64])
    assert (middle(5), inner(5)) == (11, 10)
    assert machine_code.is_assembled(inner.overloads[int64])
    assert outer(4) == 17


def test_errors_of_parts_reach_python(cache):
    for kernel in (outer, middle, inner):
        with pytest.raises(ValueError, match="below zero"):
            kernel(-1)


def test_code_and_parts_are_kept_apart_and_found_again(cache):
    outer(3)
    kept = sorted(path.name.split(".")[1] for path in cache.glob("*.nbc"))
    assert kept == ["inner", "middle", "outer"]
    middle(3)
    assert len([*cache.glob("*.middle.*.nbc")]) == 2
    for kernel in (inner, middle, outer):
        kernel._reset_overloads()
        kernel._cache_misses.clear()
        kernel._cache_hits.clear()
    signature = (numba.types.int64,)
    assert middle.compile(signature)(4) == 9
    assert (sum(middle._cache_hits.values()), sum(middle._cache_misses.values())) == (1, 0)


def test_a_kernel_that_another_process_compiles_is_waited_for(cache, caplog, monkeypatch):
    caplog.set_level("INFO")
    signature = (numba.types.int64,)
    path = outer._code._path(signature, outer.targetctx)
    cache.mkdir(parents=True, exist_ok=True)
    other = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT)
    fcntl.flock(other, fcntl.LOCK_EX)
    # The other process is done once somebody has looked whether it is.
    monkeypatch.setattr(kept_code.time, "sleep", lambda _: fcntl.flock(other, fcntl.LOCK_UN))
    assert outer(1) == 5
    os.close(other)
    assert "waited for" in caplog.text
    assert not [*cache.glob("*.lock")]


def test_processes_that_need_the_same_compile_it_once(cache):
    """Both look first; the one that gets the lock later finds what the other has kept."""
    signature = (numba.types.int64,)
    with outer._code.alone(signature, outer.targetctx):
        entered = []

        def second():
            with outer._code.alone(signature, outer.targetctx):
                entered.append(outer._code._path(signature, outer.targetctx).exists())

        thread = threading.Thread(target=second)
        thread.start()
        outer._code._path(signature, outer.targetctx).write_text("what the first has kept")
        assert entered == []
    thread.join()
    assert entered == [True]


def test_numbers_of_threads_have_one_type_inside_and_outside_of_prange():
    """prange's own are int64 where they are typed and uint64 where they run."""
    for path in WING.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.For) and ast.unparse(node.iter) == "prange(num_threads)":
                assert ast.unparse(node.body[0]) == f"thread = np.int64({node.target.id})", path
