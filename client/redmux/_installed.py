"""What is installed, read from metadata and sources: nothing is imported for it."""

import hashlib
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

# What the compiled kernels belong to beside the modules of their folder; the server has the same.
_KERNELS = Path("models/cpu")
_BELOW = ("kvcache.py", "layer_norm.py")


def version_of(package: str) -> str | None:
    """Returns the version of a distribution, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions(packages: Iterable[str]) -> str:
    """Returns the names and versions of those that are installed, in a line."""
    found = ((package, version_of(package)) for package in packages)
    return ", ".join(f"{package} {version}" for package, version in found if version is not None)


def torch_cuda() -> str | None:
    """Returns the CUDA that torch was built for, None for a build without, or no torch."""
    folder = _folder_of("torch")
    if folder is None:
        return None
    try:
        text = (folder / "version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"^cuda\b.*=\s*['\"]([\d.]+)['\"]", text, re.M)
    return found[1] if found else None


def cache_folder(environ: Mapping[str, str]) -> Path:
    """Returns the folder for what the server makes of models and kernels."""
    return Path(environ.get("REDMUX_CACHE") or Path.home() / ".cache" / "redmux")


def kernels_folder(environ: Mapping[str, str]) -> Path | None:
    """Returns where compiled kernels are, or will be; None without a server that compiles them."""
    server = _folder_of("redmux_server")
    numba, llvmlite = version_of("numba"), version_of("llvmlite")
    if server is None or numba is None or llvmlite is None:
        return None
    here = server / _KERNELS
    sources = [*sorted(here.glob("*.py")), *(here.parent / name for name in _BELOW)]
    parts = [part for path in sources for part in (path.name.encode(), path.read_bytes())]
    digest = hashlib.sha256()
    for part in (*parts, numba.encode(), llvmlite.encode()):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return cache_folder(environ) / "kernels" / digest.hexdigest()[:16]


def can_write(folder: Path) -> bool:
    """Whether a folder can be written to, or be made."""
    existing = next((path for path in (folder, *folder.parents) if path.exists()), None)
    return existing is not None and existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def _folder_of(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent
