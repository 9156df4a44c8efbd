"""How the CPU's kernels are compiled, and kept for the next start."""

from collections.abc import Callable
from functools import partial
from typing import Any

from numba.core import event
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import CPUDispatcher
from numba.core.sigutils import normalize_signature

from redmux_server.models.cpu.kept_code import KeptCode
from redmux_server.models.cpu.machine_code import (
    assembled,
    gathering,
    is_assembled,
    is_gathering,
)

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


def compiled(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Decorates a kernel: it is compiled for the types that it is first called with, and kept."""
    if function is None:
        return partial(compiled, **options)
    return _Kernel(function, _OPTIONS | options)


class _Kernel(CPUDispatcher):  # type: ignore[misc]
    """A compiled function: machine code where Python calls it, else a part of its caller's."""

    def __init__(self, function: Callable[..., Any], options: dict[str, Any]) -> None:
        super().__init__(function, targetoptions=options)
        self._code, self._part = KeptCode(function, "code"), KeptCode(function, "part")
        without_wrapper = options | {"no_cpython_wrapper": True}
        self._compiler_of_parts = type(self._compiler)(
            function, self.targetdescr, without_wrapper, {}, self._compiler.pipeline_class
        )

    def compile(self, sig: Any) -> Any:
        """Returns what is called for arguments of these types; see numba's Dispatcher."""
        with global_compiler_lock, self._compiling_counter:
            args, _ = normalize_signature(sig)
            is_part = is_gathering()
            known = self.overloads.get(tuple(args))
            if known is not None and (is_part or is_assembled(known)):
                return known.entry_point
            kept = self._part if is_part else self._code
            result = self._found(sig, kept)
            if result is None and is_part:
                result = self._made(sig, kept)
            elif result is None:
                with kept.alone(sig, self.targetctx):
                    result = self._found(sig, kept) or self._made(sig, kept)
            self.overloads[tuple(args)] = result
            if not is_part:
                self._insert([kind._code for kind in args], result.entry_point, False)
            return result.entry_point

    def _found(self, sig: Any, kept: KeptCode) -> Any:
        result = kept.load(sig, self.targetctx)
        if result is not None:
            self._cache_hits[sig] += 1
            self.targetctx.insert_user_function(result.entry_point, result.fndesc, [result.library])
        return result

    def _made(self, sig: Any, kept: KeptCode) -> Any:
        self._cache_misses[sig] += 1
        args, return_type = normalize_signature(sig)
        compiler = self._compiler_of_parts if is_gathering() else self._compiler
        details = {"dispatcher": self, "args": args, "return_type": return_type}
        with event.trigger_event("numba:compile", data=details):
            with gathering():
                result = compiler.compile(args, return_type)
            if not is_gathering():
                result = assembled(result)
        kept.save(sig, result)
        return result
