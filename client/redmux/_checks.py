"""What `redmux doctor` finds on this machine: one check for each thing that serving needs."""

import os
import platform
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import redmux
from redmux._installed import (
    cache_folder,
    can_write,
    kernels_folder,
    torch_cuda,
    version_of,
    versions,
)
from redmux._machine import Machine, gpus, num_cores

State: TypeAlias = Literal["ok", "warning", "blocks"]

_PARTS = ("redmux-adapters", "redmux-server", "redmux-bench")
_LIBRARIES = (
    "torch", "transformers", "numpy", "numba", "llvmlite", "grpcio", "protobuf",
    "prometheus-client", "triton",
)  # fmt: skip
_EXTRAS = ("matplotlib", "datasets", "tqdm", "shtab")  # of plot, train, client.map, completion
_VARIABLES = re.compile(
    r"(REDMUX|NUMBA|OMP|MKL|CUDA|TORCH|TRITON|HF|TRANSFORMERS|GRPC)_\w+|\w+_proxy", re.I
)
_SECRETS = re.compile(r"key|token|secret|password|proxy", re.I)
_LEAST_FREE_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Check:
    """What was found of one thing; `remedy` says what to do, where something is to be done."""

    name: str
    state: State
    found: str
    remedy: str = ""


def machine_checks(machine: Machine, environ: Mapping[str, str] = os.environ) -> Iterator[Check]:
    """Yields what this machine and its packages give. Imports nothing heavy."""
    yield Check("system", "ok", f"{platform.platform()}, Python {platform.python_version()}")
    yield from _packages()
    yield _processor(machine)
    yield _cores(machine.quota_cores(), num_cores())
    memory_bytes = machine.memory_bytes()
    if memory_bytes is not None:
        yield Check("memory", "ok", f"{_gib(memory_bytes)} free")
    yield _gpu(gpus(), torch_cuda())
    yield from _cache(environ)
    yield _environment(environ)


def _packages() -> Iterator[Check]:
    others = {part: version_of(part) for part in _PARTS}
    found = versions(_PARTS)
    told = f"redmux {redmux.__version__}" + (f", {found}" if found else "")
    odd = [part for part, version in others.items() if version not in (None, redmux.__version__)]
    if others["redmux-server"] is None:
        remedy = "pip install 'redmux[server]'; without it this machine can only be a client"
        yield Check("packages", "blocks", f"{told}; the server is not installed", remedy)
    elif odd:
        remedy = "install all of them in one version"
        yield Check("packages", "blocks", f"{told}; the versions differ", remedy)
    else:
        yield Check("packages", "ok", told)
    yield Check("libraries", "ok", versions((*_LIBRARIES, *_EXTRAS)))


def _processor(machine: Machine) -> Check:
    features = machine.features()
    name = machine.processor() or platform.machine()
    told = f"{name}: {', '.join(features) or 'no vector instructions known'}"
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    if is_x86 and "avx2" not in features:
        remedy = "serving works, slowly; a CPU with AVX2 or AVX-512 is what the kernels are for"
        return Check("processor", "warning", told, remedy)
    return Check("processor", "ok", told)


def _cores(quota: float | None, cores: int) -> Check:
    if quota is not None and quota < cores:
        num_threads = max(1, int(quota))
        remedy = f"redmux serve --threads {num_threads}, or threads wait for each other"
        return Check("cores", "warning", f"{cores}, of which the cgroup grants {quota:g}", remedy)
    return Check("cores", "ok", str(cores))


def _gpu(found: list[str], cuda: str | None) -> Check:
    if not found:
        return Check("gpu", "ok", "none; models run on the CPU")
    told = "; ".join(found)
    if cuda is None:
        remedy = "install a build of torch with CUDA to use it"
        return Check("gpu", "warning", f"{told}; torch is built without CUDA", remedy)
    return Check("gpu", "ok", f"{told}; torch is built for CUDA {cuda}")


def _cache(environ: Mapping[str, str]) -> Iterator[Check]:
    folder = cache_folder(environ)
    remedy = "set REDMUX_CACHE to a folder with room"
    if can_write(folder):
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        free_bytes = shutil.disk_usage(existing).free
        told = f"{folder}, {_gib(free_bytes)} free"
        if free_bytes >= _LEAST_FREE_BYTES:
            yield Check("cache", "ok", told)
        else:
            yield Check("cache", "warning", told, remedy)
    else:
        told = f"{folder} cannot be written to, so every start compiles the kernels again"
        yield Check("cache", "warning", told, remedy)
    kernels = kernels_folder(environ)
    if kernels is None:
        return
    num_kept = len(list(kernels.glob("*.nbc")))
    told = f"{num_kept} compiled" if num_kept else "not compiled yet, which the first start does"
    yield Check("kernels", "ok", told)


def _environment(environ: Mapping[str, str]) -> Check:
    found = sorted(name for name in environ if _VARIABLES.fullmatch(name))
    told = (name if _SECRETS.search(name) else f"{name}={environ[name]}" for name in found)
    return Check("environment", "ok", ", ".join(told) or "no variable that matters is set")


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.1f} GiB"
