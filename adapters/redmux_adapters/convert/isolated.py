"""Reads a stranger's file in a process of its own, with limits on memory, time and file size.

Pickles, archives and GGUF files are never opened by a server or by the process that asked. What
comes back is a safetensors file of dense tensors, in which nothing can run.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors.torch import load
from torch import Tensor

from redmux.errors import InvalidAdapterError

from ..format.files import read_file
from .worker import MAX_BYTES, REFUSED

_MAX_REASON_CHARS = 1000
_HEADER_BYTES = 4 << 20  # of at most 4096 tensors with names of at most 512 characters


def read_isolated(path: Path, timeout_s: float) -> dict[str, Tensor]:
    """Returns the tensors of a file of torch.save, GGUF or safetensors, each [n] or [n, m].

    The subprocess is killed after `timeout_s`; most of its usual two seconds are the import of
    torch. Raises InvalidAdapterError for files that hold anything but dense tensors.
    """
    source = read_file(path, MAX_BYTES)
    with tempfile.TemporaryDirectory(prefix="redmux-convert-") as folder:
        copy, target = Path(folder, "in"), Path(folder, "out.safetensors")
        copy.write_bytes(source)
        _run_worker(copy, target, timeout_s)
        return load(read_file(target, MAX_BYTES + _HEADER_BYTES))


def _run_worker(source: Path, target: Path, timeout_s: float) -> None:
    # The worker runs in the temporary folder, with the parent's import path and nothing else of
    # its environment: no keys, and no modules of whatever folder the user happens to be in.
    environment = {
        "PYTHONPATH": os.pathsep.join(os.path.abspath(entry) for entry in sys.path if entry),
        "OMP_NUM_THREADS": "1",
    }
    for name in ("PATH", "LD_LIBRARY_PATH"):
        if name in os.environ:
            environment[name] = os.environ[name]
    command = [sys.executable, "-m", f"{__package__}.worker", str(source), str(target)]
    reason_path = source.parent / "reason.txt"
    with reason_path.open("wb") as reason_file:
        try:
            code = subprocess.run(
                command,
                cwd=source.parent,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=reason_file,
                stderr=subprocess.DEVNULL,
                timeout=timeout_s,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            raise InvalidAdapterError(
                f"the file could not be read within {timeout_s:g} s; on a busy machine, try again "
                "with a larger --timeout"
            ) from None
    if code == 0:
        return
    with reason_path.open(encoding="ascii", errors="replace") as file:
        reason = " ".join(file.read(_MAX_REASON_CHARS).split())
    if code == REFUSED and reason:
        raise InvalidAdapterError(reason)
    raise InvalidAdapterError(
        f"the file could not be converted: the converter ended with code {code}, which it does on "
        "files that exceed its limits of memory and processor time"
    )
