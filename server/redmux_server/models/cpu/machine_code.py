"""Machine code for whole call trees: made once, for the kernel that Python calls.

numba optimises and assembles each function with all that it calls, then its caller with all of
that again, and so on up: a tree of eight levels eight times, for code that nobody runs. Within
`gathering`, functions are only typed and lowered, and `assemble` makes code of one of them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import llvmlite.binding as llvm
from numba.core.codegen import JITCodeLibrary
from numba.core.environment import lookup_environment
from numba.core.registry import cpu_target

_ENVIRONMENT = "_ZN08NumbaEnv"  # how the names of numba's variables for environments begin


class _Gathered(list[Any]):
    """Whose bound methods stand for entries of functions that only compiled code calls.

    numba keeps entries by their identity, and only methods that are written in C.
    """


class _State:
    """How many functions are being compiled within each other; under numba's compiler lock."""

    depth = 0


class _Library(JITCodeLibrary):  # type: ignore[misc]
    """The code of a function and all that it calls, which waits to be asked for."""

    _is_assembled = False

    def finalize(self) -> None:
        """Links what is called; assembles at once what is compiled outside of `gathering`."""
        if not _State.depth:
            super().finalize()
            self._is_assembled = True
            return
        for library in dict.fromkeys(self._linking_libraries):
            self._reload_init.update(library._reload_init)
            self._final_module.link_in(library._get_module_for_linking(), preserve=True)
        self._finalize_dynamic_globals()
        self._finalized = True

    def assemble(self) -> None:
        """Makes machine code, if there is none yet."""
        self._ensure_finalized()
        if self._is_assembled:
            return
        self._is_assembled = True
        self._optimize_final_module()
        self._final_module.verify()
        self._finalize_final_module()
        for variable in self._final_module.global_variables:
            if variable.name.startswith(_ENVIRONMENT):
                environment = lookup_environment(variable.name)
                if environment is not None:
                    self._codegen.set_env(variable.name, environment)

    def get_pointer_to_function(self, name: str) -> int:
        """See numba's class."""
        self.assemble()
        pointer: int = super().get_pointer_to_function(name)
        return pointer

    def serialize_using_object_code(self) -> Any:
        """See numba's class; what is not assembled is kept as it is."""
        if self._is_assembled:
            return super().serialize_using_object_code()
        return self.name, "gathered", self._get_module_for_linking().as_bitcode()

    @classmethod
    def _unserialize(cls, codegen: Any, state: Any) -> Any:
        name, kind, data = state
        if kind != "gathered":
            library = super()._unserialize(codegen, state)
            library._is_assembled = True
            return library
        library = codegen.create_library(name)
        library._shared_module = library._final_module = llvm.parse_bitcode(data)
        library._finalized = True
        return library


@contextmanager
def gathering() -> Iterator[None]:
    """Makes no machine code of what is compiled within; the caller holds numba's compiler lock."""
    _State.depth += 1
    try:
        yield
    finally:
        _State.depth -= 1


def is_gathering() -> bool:
    """Whether a function is being compiled that will be assembled with what it calls."""
    return _State.depth > 0


def assembled(result: Any) -> Any:
    """Returns numba's result of compiling a function, with machine code of all that it calls."""
    result.library.assemble()
    context = result.target_context
    entry = context.get_executable(result.library, result.fndesc, result.environment)
    context.insert_user_function(entry, result.fndesc, [result.library])
    return result._replace(entry_point=entry)


def is_assembled(result: Any) -> bool:
    """Whether a function that numba has compiled can be called from Python."""
    return not isinstance(result.entry_point.__self__, _Gathered)


def _install() -> None:
    """Has numba keep code in `_Library`, which outside of `gathering` is numba's own."""
    context = cpu_target.target_context
    codegen = context.codegen()
    codegen._library_class = _Library
    executable, set_env = context.get_executable, codegen.set_env

    def executable_or_stand_in(library: Any, descriptor: Any, environment: Any) -> Any:
        if _State.depth:
            return _Gathered().index
        return executable(library, descriptor, environment)

    def set_env_if_there(name: str, environment: Any) -> None:
        if codegen._engine.is_symbol_defined(name):
            set_env(name, environment)

    context.get_executable, codegen.set_env = executable_or_stand_in, set_env_if_there


_install()
