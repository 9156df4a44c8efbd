"""Import transformers without what only compiling and distributing models need.

Half of its import time is torch's compiler and its tensors over several machines, which a server
never uses, and reading the names in its own thousand files twice. Whatever another release of
transformers does in another way is imported as it comes.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_COMPILER = "torch._dynamo"
_TRANSFORM = f"{_COMPILER}._trace_wrapped_higher_order_op"


def import_transformers() -> None:
    """Imports the parts that every model needs; for the process of a server alone.

    transformers takes this process for one that is never distributed, and nothing for compiled.
    """
    utils = importlib.import_module("transformers.utils")
    names = importlib.import_module("transformers.utils.import_utils")
    with ExitStack() as stack:
        for owner, name, value in (
            (torch.distributed, "is_available", lambda: False),
            (utils, "is_torch_flex_attn_available", lambda: False),
            (names, "is_torch_flex_attn_available", lambda: False),
            (names, "define_import_structure", _known_structure(names)),
        ):
            if hasattr(owner, name):
                stack.callback(setattr, owner, name, getattr(owner, name))
                setattr(owner, name, value)
        stack.enter_context(without_compiler())
        # This one asks torch once and keeps the answer.
        getattr(names, "is_torch_distributed_available", lambda: None)()
        for module in ("modeling_utils", "masking_utils", "generation.utils", "models.auto"):
            importlib.import_module(f"transformers.{module}")


def _known_structure(names: Any) -> Callable[..., Any]:
    """Returns what gives the names in transformers.models as its package has read them before."""
    read = getattr(names, "define_import_structure", None)

    def structure(path: str, prefix: str | None = None) -> Any:
        folder = Path(path).parent
        if prefix is not None or folder.name != "models":
            return read(path, prefix)  # type: ignore[misc]
        found = read(folder, prefix="models")  # type: ignore[misc]
        return {
            needs: {name.removeprefix("models."): those for name, those in modules.items()}
            for needs, modules in found.items()
        }

    return structure


class _StandIn(ModuleType):
    """A module with a few names of the real one, which it gives way to when asked for another."""

    def __getattr__(self, name: str) -> Any:
        is_part_wanted = name == "__path__" and self.__name__ == _COMPILER
        if name.startswith("__") and not is_part_wanted:
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


@contextmanager
def without_compiler() -> Iterator[None]:
    """Has torch's compiler stay away from what is imported and run within.

    Modules ask it for marks on their functions, and models that are made before their weights are
    read for leave to compute; each would import all of it.
    """
    stand_ins = {} if _COMPILER in sys.modules else _stand_ins()
    sys.modules |= stand_ins
    try:
        yield
    finally:
        for name, module in stand_ins.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]


def _stand_ins() -> dict[str, _StandIn]:
    def as_it_is(function: Any = None, *_: Any, **__: Any) -> Any:
        return function or as_it_is

    def transform() -> Any:  # for unusual masks
        return importlib.import_module(_TRANSFORM).TransformGetItemToIndex()

    marks = dict.fromkeys(("allow_in_graph", "assume_constant_result", "disable"), as_it_is)
    known: dict[str, dict[str, Any]] = {
        _COMPILER: marks,
        _TRANSFORM: {"TransformGetItemToIndex": transform},
    }
    made = {module: _StandIn(module) for module in known}
    for module, names in known.items():
        made[module].__dict__.update(names)
    return made
