"""How the CPU's kernels are compiled, and kept for the next start."""

import logging
import pickle
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.core import event
from numba.core.caching import CompileResultCacheImpl, FunctionCache
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import CPUDispatcher
from numba.core.sigutils import normalize_signature

from redmux_adapters.bases.cache import (
    cache_folder,
    digest_of_files,
    mark_used,
    remove_unused,
)
from redmux_server.models.cpu.machine_code import (
    assembled,
    gathering,
    is_assembled,
    is_gathering,
)

logger = logging.getLogger(__name__)

# Contraction to fused multiply-add is the same in every lane; nothing may be reordered. A loop
# that may raise ZeroDivisionError is not vectorised, so division follows IEEE 754.
_OPTIONS = {
    "nopython": True,
    "boundscheck": None,
    "fastmath": {"contract", "nsz"},
    "nogil": True,
    "error_model": "numpy",
    "no_cfunc_wrapper": True,
}
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
    return _Kernel(function, _OPTIONS | options)


class _Kernel(CPUDispatcher):  # type: ignore[misc]
    """A compiled function: machine code where Python calls it, else a part of its caller's."""

    def __init__(self, function: Callable[..., Any], options: dict[str, Any]) -> None:
        super().__init__(function, targetoptions=options)
        self._cache, self._cache_of_parts = _Kept(function), _Kept(function, "part")
        without_wrapper = options | {"no_cpython_wrapper": True}
        self._compiler_of_parts = type(self._compiler)(
            function, self.targetdescr, without_wrapper, {}, self._compiler.pipeline_class
        )

    def compile(self, sig: Any) -> Any:
        """Returns what is called for arguments of these types; see numba's Dispatcher."""
        with global_compiler_lock, self._compiling_counter:
            args, return_type = normalize_signature(sig)
            is_part = is_gathering()
            known = self.overloads.get(tuple(args))
            if known is not None and (is_part or is_assembled(known)):
                return known.entry_point
            cache = self._cache_of_parts if is_part else self._cache
            result = cache.load_overload(sig, self.targetctx)
            if result is not None:
                self._cache_hits[sig] += 1
                self.targetctx.insert_user_function(
                    result.entry_point, result.fndesc, [result.library]
                )
            else:
                self._cache_misses[sig] += 1
                result = self._compile(args, return_type, is_part)
                cache.save_overload(sig, result)
            self.overloads[tuple(args)] = result
            if not is_part:
                self._insert([kind._code for kind in args], result.entry_point, False)
            return result.entry_point

    def _compile(self, args: Any, return_type: Any, is_part: bool) -> Any:
        compiler = self._compiler_of_parts if is_part else self._compiler
        details = {"dispatcher": self, "args": args, "return_type": return_type}
        with event.trigger_event("numba:compile", data=details):
            with gathering():
                result = compiler.compile(args, return_type)
            return result if is_part else assembled(result)


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

    def __init__(self, function: Any, kind: str = "") -> None:
        super().__init__(function)
        self._kind = kind

    def _index_key(self, sig: Any, codegen: Any) -> Any:
        return (*super()._index_key(sig, codegen), self._kind)

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
