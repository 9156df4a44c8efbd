"""vLLM's own code for sampling, out of its wheel, without what it needs to serve.

`make test-vllm` fetches the wheel. The modules of `_REAL` run as they are; of all others there are
stand-ins without content, so that nothing is registered with torch and no GPU is looked for.
"""

import ast
import importlib
import sys
import zipimport
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch

ROOT = Path(__file__).parents[1]
_REAL = ("vllm.model_executor.layers.utils", "vllm.v1.sample")
_THIS_MACHINE = SimpleNamespace(
    is_cpu=lambda: True, is_cuda=lambda: False, is_rocm=lambda: False, is_xpu=lambda: False,
    get_cpu_architecture=lambda: "x86", simple_compile_backend="eager",
)  # fmt: skip


def _padded(rows, pad, dtype, **options):
    longest = max(map(len, rows))
    return torch.tensor([row + [pad] * (longest - len(row)) for row in rows], dtype=dtype)


_HELD = {  # by stand-ins
    "vllm._aiter_ops": {"rocm_aiter_ops": SimpleNamespace(is_enabled=lambda: False)},
    "vllm._custom_ops": {"torch": torch},
    "vllm.platforms": {
        "current_platform": _THIS_MACHINE,
        "CpuArchEnum": SimpleNamespace(RISCV="riscv", POWERPC="powerpc"),
    },
    "vllm.triton_utils": {"HAS_TRITON": False},
    "vllm.utils.torch_utils": {
        "PIN_MEMORY": False,
        "async_tensor_h2d": lambda data, device, dtype: torch.tensor(data, dtype=dtype),
        "make_tensor_with_pad": _padded,
    },
}
# Of a module that registers kernels where it is run as a whole.
_OF_CUSTOM_OPS = ("apply_repetition_penalties", "apply_repetition_penalties_torch")


def wheel():
    """Returns the path of vLLM's wheel, None where it was not fetched."""
    return next(iter((ROOT / ".vllm").glob("vllm-*.whl")), None)


@contextmanager
def vllm_sampling(path):
    """Gives a function that imports modules of `vllm.v1.sample` of this wheel; they end with it."""
    finder = _Finder(path)
    sys.meta_path.insert(0, finder)
    try:
        yield importlib.import_module
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
            del sys.modules[name]


class _Finder:
    def __init__(self, path):
        self._wheel = path

    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] != "vllm":
            return None
        if name.startswith(_REAL):
            folder = self._wheel.joinpath(*name.split(".")[:-1])
            return zipimport.zipimporter(str(folder)).find_spec(name)
        return ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return _StandIn(spec.name)

    def exec_module(self, module):
        vars(module).update(_HELD.get(module.__name__, {}))
        if module.__name__ == "vllm._custom_ops":
            source = zipimport.zipimporter(str(self._wheel / "vllm")).get_source("_custom_ops")
            tree = ast.parse(source)
            tree.body = [node for node in tree.body if getattr(node, "name", "") in _OF_CUSTOM_OPS]
            exec(compile(tree, str(self._wheel), "exec"), vars(module))


class _StandIn(ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__init__": lambda self, *args, **options: None})
