"""How the CPU's kernels are compiled, and kept for the next start."""

import logging
import pickle
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba import njit
from numba.core.caching import CompileResultCacheImpl, FunctionCache

from redmux_adapters.bases.cache import (
    cache_folder,
    digest_of_files,
    mark_used,
    remove_unused,
)

logger = logging.getLogger(__name__)

# Contraction to fused multiply-add is the same in every lane; nothing may be reordered. A loop
# that may raise ZeroDivisionError is not vectorised, so division follows IEEE 754.
_compile = partial(njit, fastmath={"contract", "nsz"}, nogil=True, error_model="numpy")
# Whose numbers are part of machine code, beside the modules here.
_BELOW = ("kvcache.py", "layer_norm.py")
_BROKEN = (OSError, EOFError, ValueError, pickle.UnpicklingError)


def compiled(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Decorates a kernel: it is compiled for the types that it is first called with, and kept.

    What is kept belongs to the sources of all kernels: numba alone would look at the file of the
    function only, and go on with what it compiled before one of another module was changed.
    """
    if function is None:
        return partial(compiled, **options)
    dispatcher = _compile(**options)(function)
    dispatcher._cache = _Kept(function)
    return dispatcher


@cache
def _folder() -> Path:
    here = Path(__file__).parent
    sources = [*sorted(here.glob("*.py")), *(here.parent / name for name in _BELOW)]
    key = digest_of_files(sources, numba.__version__, llvmlite.__version__)
    folder = cache_folder() / "kernels" / key[:16]
    if folder.is_dir():
        mark_used(folder)
    return folder


@cache
def _make_room() -> None:
    """Removes, once, what nobody has used for long."""
    remove_unused(_folder().parent)


class _Locator:
    """Where a kernel is kept: in the folder of all kernels' sources, by its place in its file."""

    def __init__(self, function: Any, file: str) -> None:
        self._py_file = file  # which numba's warnings name
        self._line = function.__code__.co_firstlineno

    @classmethod
    def from_function(cls, function: Any, file: str) -> "_Locator":
        return cls(function, file)

    def ensure_cache_path(self) -> None:
        _folder().mkdir(parents=True, exist_ok=True)

    def get_cache_path(self) -> str:
        return str(_folder())

    def get_source_stamp(self) -> str:
        return digest_of_files([Path(self._py_file)])  # for kernels that are elsewhere

    def get_disambiguator(self) -> str:
        return str(self._line)


class _Implementation(CompileResultCacheImpl):  # type: ignore[misc]
    _locator_classes = [_Locator]  # noqa: RUF012


class _Kept(FunctionCache):  # type: ignore[misc]
    """numba's cache of a function, which only saves work: where it is broken, it is as if empty."""

    _impl_class = _Implementation

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except _BROKEN as err:
            logger.warning("compiled code in %s is ignored: %r", self.cache_path, err)
            self._write(self.flush)
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        _make_room()
        self._write(lambda: super(_Kept, self).save_overload(sig, data))

    def _write(self, action: Callable[[], None]) -> None:
        try:
            action()
        except _BROKEN as err:
            logger.warning("cannot keep compiled code in %s: %r", self.cache_path, err)
