"""The process that opens a stranger's file: `python -m redmux_adapters.convert.worker IN OUT`.

torch's weights-only loader runs no code from the file, but it accepts sparse tensors that point out
of their bounds, one-element storages expanded to terabytes and archives that inflate 200-fold; the
readers of other containers are lenient in their own ways. So they run with limits, and only dense
floating-point tensors pass. What they are called is checked by whoever started the process.
"""

import resource
import sys
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from redmux.errors import InvalidAdapterError

from ..format.header import Limits
from ..format.strictjson import shown

MAX_BYTES = 64 << 20
REFUSED = 3  # exit status with the reason, one line of ASCII, on standard output
_ADDRESS_SPACE_BYTES = 2 << 30
_CPU_S = 60
_OPEN_FILES = 64
_MAX_CAUSE_CHARS = 200
_MAX_NAME_CHARS = 512
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def main(argv: list[str]) -> int:
    """Converts the file `argv[0]` of any known container to the safetensors file `argv[1]`."""
    source, target = argv
    limit_resources()
    try:
        save_file(read_tensors(source), target)
    except InvalidAdapterError as err:
        print(ascii(err.message)[1:-1])
        return REFUSED
    except MemoryError:
        print("the file takes too much memory to read")
        return REFUSED
    return 0


def limit_resources() -> None:
    """Bounds what this process may use from now on: memory, processor time, file size, files.

    Where the system does not tell the present address space (no /proc), memory is not bounded.
    """
    statm = Path("/proc/self/statm")
    if statm.exists():
        used = int(statm.read_text().split()[0]) * resource.getpagesize()
        _lower(resource.RLIMIT_AS, used + _ADDRESS_SPACE_BYTES)
    _lower(resource.RLIMIT_CPU, _CPU_S)
    _lower(resource.RLIMIT_FSIZE, MAX_BYTES + (4 << 20))
    _lower(resource.RLIMIT_NOFILE, _OPEN_FILES)
    _lower(resource.RLIMIT_CORE, 0)


def read_tensors(path: str) -> dict[str, Tensor]:
    """Returns the tensors of a file of torch.save, a GGUF or a safetensors file, by their names.

    They are own copies in the file's precision. Raises InvalidAdapterError.
    """
    with open(path, "rb") as file:
        start = file.read(4)
    if start == b"GGUF":
        entries = _read_gguf(path)
    elif start in (b"PK\x03\x04", b"PK\x05\x06"):
        entries = _read_torch(path)
    else:
        entries = _read_safetensors(path)
    views: dict[str, Tensor] = {}
    for name, value in entries:
        if not isinstance(name, str) or len(name) > _MAX_NAME_CHARS:
            raise InvalidAdapterError(f"unexpected entry {shown(name)}")
        views[name] = _dense(name, value)
    # Views may share one storage: their copies are bounded too.
    if sum(view.numel() * view.element_size() for view in views.values()) > MAX_BYTES:
        raise InvalidAdapterError(f"the tensors exceed {MAX_BYTES} bytes")
    return {name: view.clone() for name, view in views.items()}


def _read_torch(path: str) -> Iterable[tuple[object, Any]]:
    check_archive(path)
    torch.sparse.check_sparse_tensor_invariants.enable()  # type: ignore[no-untyped-call]
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as err:  # torch raises whatever the bytes provoke
        raise InvalidAdapterError(f"torch refuses the file: {_first_cause(err)}") from None
    if not isinstance(content, dict) or not content:
        raise InvalidAdapterError(
            f"the file holds {shown(type(content).__name__)}; it has to hold a dictionary of "
            "tensors"
        )
    _check_count(len(content))
    return content.items()


def _read_safetensors(path: str) -> Iterable[tuple[object, Any]]:
    try:
        content = load_file(path)
    except Exception as err:  # the library raises whatever the bytes provoke
        with open(path, "rb") as file:
            if file.read(1) == b"\x80":
                raise InvalidAdapterError(
                    "the file is a bare pickle, as torch.save wrote it before 1.6, and is not "
                    "opened here; where you trust it, load it and save it again with a newer torch"
                ) from None
        raise InvalidAdapterError(
            "the file is neither one of torch.save (a zip archive) nor GGUF nor safetensors: "
            f"{shown(str(err))}"
        ) from None
    _check_count(len(content))
    return content.items()


def _read_gguf(path: str) -> Iterable[tuple[object, Any]]:
    from gguf import GGMLQuantizationType, GGUFReader

    try:
        tensors = GGUFReader(path).tensors
    except Exception as err:  # the library raises whatever the bytes provoke
        raise InvalidAdapterError(f"the GGUF file cannot be read: {shown(str(err))}") from None
    _check_count(len(tensors))
    for tensor in tensors:
        if tensor.tensor_type not in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
            raise InvalidAdapterError(
                f"{shown(tensor.name)} is of type {tensor.tensor_type.name}; allowed are F32 and "
                "F16"
            )
        yield tensor.name, torch.tensor(tensor.data)


def _check_count(count: int) -> None:
    if count > Limits().num_tensors:
        raise InvalidAdapterError(f"the file holds {count} entries; limit {Limits().num_tensors}")


def check_archive(path: str) -> None:
    """Raises InvalidAdapterError unless `path` is a zip archive as torch.save writes it.

    That is one without compression, of entries that sum up to 64 MiB at most and have the checksums
    that the archive gives for them: torch does not look at those.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            _check_entries(archive.infolist())
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError) as err:
        raise InvalidAdapterError(
            f"the file is no zip archive as torch.save writes it: {shown(str(err))}"
        ) from None
    if damaged is not None:
        raise InvalidAdapterError(
            f"the archive's entry {shown(damaged)} does not have its checksum: the file is "
            "damaged; get it again"
        )


def _check_entries(entries: Sequence[zipfile.ZipInfo]) -> None:
    total = sum(entry.file_size for entry in entries)
    if total > MAX_BYTES:
        raise InvalidAdapterError(f"the archive unpacks to {total} bytes; limit {MAX_BYTES}")
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED:
            raise InvalidAdapterError(
                f"the archive's entry {shown(entry.filename)} is compressed, which torch.save "
                "never does"
            )


def _dense(key: str, value: Any) -> Tensor:
    """Returns `value`, still a view, if its memory is really there."""
    if type(value) not in (Tensor, torch.nn.Parameter):
        raise InvalidAdapterError(f"{shown(key)} is {shown(type(value).__name__)}, not a tensor")
    tensor: Tensor = value.detach()
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise InvalidAdapterError(
            f"{shown(key)} is a {tensor.layout} tensor on {tensor.device}; it has to be a dense "
            "one with its values"
        )
    if tensor.dtype not in _DTYPES:
        raise InvalidAdapterError(
            f"{shown(key)} has dtype {tensor.dtype}; allowed are float32, float16 and bfloat16"
        )
    if tensor.dim() not in (1, 2) or tensor.numel() == 0:
        raise InvalidAdapterError(
            f"{shown(key)} has shape {shown(list(tensor.shape))}; it has to be a vector or a matrix"
        )
    needed = (tensor.storage_offset() + tensor.numel()) * tensor.element_size()
    if not tensor.is_contiguous() or needed > tensor.untyped_storage().nbytes():
        raise InvalidAdapterError(
            f"{shown(key)} claims {tensor.numel()} values at stride {tensor.stride(-1)}, its "
            f"storage of {tensor.untyped_storage().nbytes()} bytes has to hold them one by one"
        )
    return tensor


def _first_cause(err: Exception) -> str:
    """Returns the line of torch's long advice that says what is wrong."""
    lines = [line.strip() for line in str(err).splitlines() if line.strip()]
    telling = [line for line in lines if "WeightsUnpickler error:" in line or "GLOBAL" in line]
    line = (telling or lines or [type(err).__name__])[0]
    return ascii(line.removeprefix("WeightsUnpickler error: ")[:_MAX_CAUSE_CHARS])


def _lower(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(kind, (value, value))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
