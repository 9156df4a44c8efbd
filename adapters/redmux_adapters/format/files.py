"""Reads and writes adapters: a folder of two files, or one self-contained safetensors file."""

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from redmux._nearest import nearest
from redmux.errors import (
    InvalidAdapterError,
    InvalidArgumentError,
    RedmuxError,
    ResourceExhaustedError,
)

from .adapter import Adapter, Edit
from .config import CONFIG_NAME, AdapterConfig, format_config, parse_config
from .head import Head, check_shapes
from .header import HEAD_PREFIX, Header, Limits, read_header, write_container
from .seal import check_seal
from .strictjson import shown
from .vectors import check_file_values, digest_of, read_head, read_vectors, vector_bytes

WEIGHTS_NAME = "adapter_model.safetensors"
_DEFAULT = Limits()
_SHORTAGES = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN))


@dataclass(frozen=True, slots=True)
class Summary:
    """What is known of a checked adapter without holding its vectors."""

    config: AdapterConfig
    digest: str
    num_sites: int
    num_parameters: int
    num_head_parameters: int = 0

    @property
    def nbytes(self) -> int:
        """Size in memory, of the vectors and of the head."""
        return 4 * (self.num_parameters + self.num_head_parameters)


def read_adapter(
    path: str | Path,
    *,
    expected_sites: Mapping[str, int] | None = None,
    limits: Limits = _DEFAULT,
) -> Adapter:
    """Returns the adapter in a folder or in a self-contained safetensors file.

    Files have to be regular ones: symbolic links, pipes and devices are refused. See
    `parse_adapter` for `expected_sites`. Raises InvalidAdapterError.
    """
    data, config_json = read_parts(Path(path), limits)
    return parse_adapter(data, config_json, expected_sites=expected_sites, limits=limits)


def read_parts(path: Path, limits: Limits = _DEFAULT) -> tuple[bytes, str | None]:
    """Returns the safetensors bytes of a folder or file, and the text of adapter_config.json.

    The text is None for a file, which carries its own. Raises InvalidAdapterError.
    """
    if not path.is_dir():
        return read_file(path, limits.file_bytes), None
    config = read_file(path / CONFIG_NAME, limits.config_bytes)
    data = read_file(path / WEIGHTS_NAME, limits.file_bytes)
    try:
        text = config.decode("utf-8")
    except UnicodeDecodeError as err:
        raise InvalidAdapterError(f"{CONFIG_NAME} is not UTF-8: bad byte at {err.start}") from None
    if not text:
        raise InvalidAdapterError(f"{CONFIG_NAME} is empty")
    return data, text


def parse_adapter(
    safetensors: bytes,
    config_json: str | None = None,
    *,
    expected_sites: Mapping[str, int] | None = None,
    hidden_size: int | None = None,
    check_config: Callable[[AdapterConfig], None] | None = None,
    limits: Limits = _DEFAULT,
) -> Adapter:
    """Returns the adapter in the bytes of a safetensors file.

    `config_json` is the text of adapter_config.json; None or "" where the file's own metadata
    carries it. `expected_sites` are the base model's editable modules with their output sizes; an
    edit of any other module, or of another size, is refused, and with the base model's
    `hidden_size` a head for another one. Before that `check_config` is called, which may refuse
    the base model that the adapter names: modules of another one would be refused for their sizes.
    Nothing but InvalidAdapterError and what `check_config` raises is raised, whatever the bytes.
    """
    header = read_header(safetensors, limits)
    check_seal(header, safetensors)
    config = _find_config(header, config_json or None, limits)
    if check_config is not None:
        check_config(config)
    return _read_adapter(header, safetensors, config, expected_sites, hidden_size)


def parse_known(
    safetensors: bytes,
    config: AdapterConfig,
    *,
    expected_sites: Mapping[str, int] | None = None,
    hidden_size: int | None = None,
    limits: Limits = _DEFAULT,
) -> Adapter:
    """Returns what `parse_adapter` does, of a file whose configuration is known from before."""
    header = read_header(safetensors, limits)
    check_seal(header, safetensors)
    return _read_adapter(header, safetensors, config, expected_sites, hidden_size)


def summarize(
    safetensors: bytes,
    config_json: str | None = None,
    *,
    expected_sites: Mapping[str, int] | None = None,
    hidden_size: int | None = None,
    check_config: Callable[[AdapterConfig], None] | None = None,
    limits: Limits = _DEFAULT,
) -> Summary:
    """Checks everything that `parse_adapter` does and raises as it does, in two thirds of its time.

    No vector becomes a tensor; what is checked is dropped but for the summary.
    """
    header = read_header(safetensors, limits)
    check_seal(header, safetensors)
    config = _find_config(header, config_json or None, limits)
    if check_config is not None:
        check_config(config)
    _check_header_sites(header, expected_sites)
    _check_head(header, config, hidden_size)
    vectors, head = read_vectors(header, safetensors), read_head(header, safetensors)
    check_file_values(header, safetensors, vectors, head)
    digest = digest_of(
        config.base_fingerprint, config.prompt_format, vectors, config.head, head, config.apply
    )
    num_parameters = 2 * sum(header.tensors.site_dims.values())
    num_head_parameters = sum(array.size for array in head.values())
    return Summary(config, digest, len(vectors), num_parameters, num_head_parameters)


def summary_of(adapter: Adapter) -> Summary:
    """Returns what `summarize` returns for the file of `adapter`."""
    return Summary(
        _config(adapter),
        adapter.digest,
        len(adapter.edits),
        adapter.num_parameters,
        0 if adapter.head is None else adapter.head.num_parameters,
    )


def to_bytes(adapter: Adapter) -> bytes:
    """Returns the self-contained safetensors file of `adapter`; equal adapters give equal bytes."""
    return _container(adapter, {"format": "pt", "adapter_config": _config_text(adapter)})


def write_folder(adapter: Adapter, folder: str | Path) -> None:
    """Writes the two files of `adapter` into `folder`, creating it; each appears whole or not."""
    folder = Path(folder)
    data = _container(adapter, {"format": "pt"})
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / WEIGHTS_NAME, data)
    _replace(folder / CONFIG_NAME, _config_text(adapter).encode())


def write_file(adapter: Adapter, path: str | Path) -> None:
    """Writes `to_bytes` of `adapter` to a .safetensors file, which appears whole or not.

    Folders above it are created. Raises InvalidArgumentError for another ending.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise InvalidArgumentError(f"{shown(str(path))} does not end with .safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, to_bytes(adapter))


def read_file(path: Path, max_bytes: int) -> bytes:
    """Returns the content of a regular file of at most `max_bytes`, or raises InvalidAdapterError.

    Raises ResourceExhaustedError where it is the system that has too little left, of descriptors
    for instance: that says nothing about the file. The size is checked before reading, and the
    bytes are a private copy: what happens to the file afterwards does not matter.
    """
    try:
        # Without O_NONBLOCK, opening a pipe waits for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as err:
        if err.errno == errno.ELOOP:
            raise InvalidAdapterError(f"{path} is a symbolic link; give the file itself") from None
        raise _refused("open", path, err) from None
    except ValueError:
        raise InvalidAdapterError(f"{shown(str(path))} is not a possible path") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise InvalidAdapterError(f"{path} is not a regular file")
        if status.st_size > max_bytes:
            raise InvalidAdapterError(f"{path} has {status.st_size} bytes; limit {max_bytes}")
        data = _read(descriptor, status.st_size + 1)
    except OSError as err:
        raise _refused("read", path, err) from None
    finally:
        os.close(descriptor)
    if len(data) != status.st_size:
        raise InvalidAdapterError(f"{path} changed while it was read; try again")
    return data


def _refused(what: str, path: Path, err: OSError) -> RedmuxError:
    if err.errno in _SHORTAGES:
        return ResourceExhaustedError(
            f"cannot {what} {path.name}: {err.strerror}; try again", retry_after_s=1.0
        )
    return InvalidAdapterError(f"cannot {what} {path}: {err.strerror}")


def _read(descriptor: int, num_bytes: int) -> bytes:
    """Returns that many bytes, or fewer at the end of the file."""
    data = os.read(descriptor, num_bytes)  # of a regular file this is all, but for signals
    while len(data) < num_bytes and (more := os.read(descriptor, num_bytes - len(data))):
        data += more
    return data


def _find_config(header: Header, config_json: str | None, limits: Limits) -> AdapterConfig:
    """Parses the configuration, which comes from outside, from inside, or the same from both."""
    texts = [text for text in (config_json, header.metadata.get("adapter_config")) if text]
    if not texts:
        raise InvalidAdapterError(
            f"no {CONFIG_NAME}: give it beside the file, or as 'adapter_config' in its "
            "__metadata__, as `redmux adapters pack FOLDER --output FILE.safetensors` does"
        )
    for text in texts:
        # 4 bytes a character at most, so a cheap bound comes first.
        if len(text) > limits.config_bytes or _num_bytes(text) > limits.config_bytes:
            raise InvalidAdapterError(
                f"{CONFIG_NAME} has {_num_bytes(text)} bytes; limit {limits.config_bytes}"
            )
    configs = [parse_config(text) for text in texts]
    if configs[0] != configs[-1]:
        raise InvalidAdapterError(
            f"{CONFIG_NAME} differs from the one in the file's __metadata__; remove one of them"
        )
    return configs[0]


def _read_edits(
    header: Header, data: bytes, expected_sites: Mapping[str, int] | None
) -> dict[str, Edit]:
    _check_header_sites(header, expected_sites)
    vectors = read_vectors(header, data)
    own = torch.from_numpy(np.concatenate([v for pair in vectors.values() for v in pair]))
    edits, start = {}, 0
    for site, (scale, _) in vectors.items():
        middle, end = start + len(scale), start + 2 * len(scale)
        edits[site] = Edit.adopt(own[start:middle], own[middle:end])
        start = end
    return edits


def _read_adapter(
    header: Header,
    data: bytes,
    config: AdapterConfig,
    expected_sites: Mapping[str, int] | None,
    hidden_size: int | None,
) -> Adapter:
    edits = _read_edits(header, data, expected_sites)
    _check_head(header, config, hidden_size)
    head = None
    if config.head is not None:
        arrays = read_head(header, data)
        head = Head(config.head, {name: torch.tensor(array) for name, array in arrays.items()})
    return Adapter(
        config.base_fingerprint, edits, config.prompt_format, config.metadata, head, config.apply
    )


def _check_head(header: Header, config: AdapterConfig, hidden_size: int | None) -> None:
    entries = header.tensors.head
    if config.head is not None:
        shapes = {name: entry.shape for name, entry in entries.items()}
        check_shapes(config.head, shapes, hidden_size)
    elif entries:
        raise InvalidAdapterError(
            f"the file has {len(entries)} tensors of a head, but {CONFIG_NAME} has no head"
        )


def _check_header_sites(header: Header, expected_sites: Mapping[str, int] | None) -> None:
    dims = header.tensors.site_dims  # raises by itself where they disagree
    if expected_sites is not None:
        check_sites(dims, expected_sites)


def check_sites(sites: Mapping[str, int], expected_sites: Mapping[str, int]) -> None:
    """Raises InvalidAdapterError unless the base model has every site, in its size."""
    if not sites.items() <= expected_sites.items():  # one comparison where all is well
        for site, dim in sites.items():
            _check_expected(site, dim, expected_sites)


def _check_expected(site: str, dim: int, expected_sites: Mapping[str, int]) -> None:
    expected = expected_sites.get(site)
    if expected is None and any(path.startswith(f"{site}.") for path in expected_sites):
        raise InvalidAdapterError(
            f"{shown(site)} is a block of modules whose output cannot be edited here; those of the "
            "linear modules inside it can"
        )
    if expected is None:
        near = nearest(site, expected_sites, 3) or list(expected_sites)[:1]
        raise InvalidAdapterError(
            f"the base model has no editable module {shown(site)}; near: {', '.join(near)}"
        )
    if dim != expected:
        raise InvalidAdapterError(
            f"the vectors of {shown(site)} have {dim} values; this module has {expected} outputs"
        )


def _container(adapter: Adapter, metadata: Mapping[str, str]) -> bytes:
    tensors = {}
    for site, (scale, bias) in adapter.vectors().items():
        tensors[f"{site}.scale"] = vector_bytes(scale)
        tensors[f"{site}.bias"] = vector_bytes(bias)
    shapes = {}
    if adapter.head is not None:
        for name, array in adapter.head.arrays().items():
            tensors[f"{HEAD_PREFIX}{name}"] = vector_bytes(array)
            shapes[f"{HEAD_PREFIX}{name}"] = array.shape
    data = write_container(tensors, metadata, shapes)
    read_header(data)  # an adapter too large to be read is refused here, not by its user
    return data


def _config_text(adapter: Adapter) -> str:
    return format_config(_config(adapter))


def _config(adapter: Adapter) -> AdapterConfig:
    return AdapterConfig(
        adapter.base_fingerprint,
        adapter.prompt_format,
        adapter.metadata,
        None if adapter.head is None else adapter.head.config,
        adapter.apply,
    )


def _num_bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def _replace(path: Path, data: bytes) -> None:
    descriptor, partial = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise
