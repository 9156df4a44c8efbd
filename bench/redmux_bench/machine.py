"""What figures depend on beside this project: the processor, the memory, versions."""

import importlib.metadata
import os
import platform
from contextlib import suppress
from pathlib import Path

import redmux


def machine() -> dict[str, object]:
    """Returns what is to stand beside a figure of a CPU."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "load_average": os.getloadavg(),
        "system": platform.platform(),
        "redmux": redmux.__version__,
        "python": platform.python_version(),
        "packages": versions("torch", "transformers", "numba", "grpcio"),
    }


def device_and_versions(device: str, *packages: str) -> dict[str, str]:
    """Returns the name of "cuda" or "cpu", and the versions of Python and of these packages."""
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "cpu"
    return {"device": name, "python": platform.python_version(), **versions(*packages)}


def versions(*packages: str) -> dict[str, str]:
    """Returns the versions of those of the packages that are installed."""
    found = {}
    for package in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
