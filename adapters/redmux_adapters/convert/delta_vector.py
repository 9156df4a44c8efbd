"""Converts `delta_vector.pth`, the file of the RED authors' code (mlwu22/RED).

Such a file is a pickle, so it is opened by a subprocess with limits on memory, time and file size,
never by a server. What comes back is a plain safetensors file, read as strictly as any other.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from redmux.errors import InvalidAdapterError

from ..adapter import Adapter
from ..config import AdapterMetadata
from ..files import parse_edits, read_file
from ..header import Limits
from ..prompt import PromptFormat
from .worker import MAX_BYTES, REFUSED

_MAX_REASON_CHARS = 1000


def convert_delta_vector(
    path: str | Path,
    base_fingerprint: str,
    *,
    prompt_format: PromptFormat | None = None,
    metadata: AdapterMetadata | None = None,
    expected_sites: Mapping[str, int] | None = None,
    timeout_s: float = 120.0,
) -> Adapter:
    """Returns the adapter in a `delta_vector.pth`, RED or RED++, in fp32, fp16 or bf16.

    `expected_sites` are the base model's editable modules, see `parse_adapter`. A classification
    head (`classifier.pth`) is another file and not read. The work is done by a subprocess that is
    killed after `timeout_s`; most of its usual two seconds are the import of torch.

    Raises InvalidAdapterError for files that hold anything but RED vectors.
    """
    source = read_file(Path(path), MAX_BYTES)
    with tempfile.TemporaryDirectory(prefix="redmux-convert-") as folder:
        copy, target = Path(folder, "in.pth"), Path(folder, "out.safetensors")
        copy.write_bytes(source)
        _run_worker(copy, target, timeout_s)
        data = read_file(target, Limits().file_bytes)
    edits = parse_edits(data, expected_sites=expected_sites)
    return Adapter(base_fingerprint, edits, prompt_format, metadata or AdapterMetadata())


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
                f"the file could not be converted within {timeout_s:g} s"
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
