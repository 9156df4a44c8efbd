"""A first start says that it compiles; a later one has nothing to say."""

import numba

from redmux_server.models.compilation import compilation_told


def test_what_is_compiled_is_told_once_and_counted_and_what_is_there_is_not(caplog):
    caplog.set_level("INFO")

    @numba.njit
    def inner(x):
        return x + 1

    @numba.njit
    def outer(x):
        return inner(x) + 1

    with compilation_told():
        assert outer(1) == 3
    first, last = caplog.messages
    assert first.startswith("compiling kernels for this CPU")
    assert last.startswith("compiled 2 kernels while loading")
    caplog.clear()
    with compilation_told():
        assert outer(1) == 3
    assert caplog.messages == []
