"""The numbers of an adapter: read from a file's bytes, checked and hashed, all in NumPy.

A torch operation on a vector of a thousand values costs more than its arithmetic, and an adapter
has dozens of them; a server that checks ten thousand files at start cannot afford it.
"""

import functools
import hashlib
import json
import math
import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from redmux.errors import InvalidAdapterError

from .head import HeadArrays, HeadConfig
from .header import HEAD_PREFIX, Header, TensorEntry
from .prompt import PromptFormat
from .strictjson import shown
from .window import ALL

MAX_MAGNITUDE = 1e4
_DIGEST_DOMAIN = b"redmux-adapter-v1"
_IS_LITTLE = sys.byteorder == "little"

Vector = NDArray[np.float32]
Vectors = Mapping[str, tuple[Vector, Vector]]  # module path -> scale, bias, each [dim]


def read_vectors(header: Header, data: bytes) -> Vectors:
    """Returns the vectors of a file whose header is checked; the values are not.

    They are views of `data` where that holds fp32, so they cannot be written to. A missing scale is
    1, a missing bias 0.
    """
    read = _reader(header, data)
    dims = header.tensors.site_dims
    return {
        site: (
            np.ones(dims[site], np.float32) if scale is None else read(scale),
            np.zeros(dims[site], np.float32) if bias is None else read(bias),
        )
        for site, (scale, bias) in header.tensors.pairs.items()
    }


def read_head(header: Header, data: bytes) -> HeadArrays:
    """Returns the tensors of the head in a file whose header is checked; the values are not."""
    read = _reader(header, data)
    return {name: read(e).reshape(e.shape) for name, e in header.tensors.head.items()}


def _reader(header: Header, data: bytes) -> Callable[[TensorEntry], Vector]:
    """Returns what gives the values of an entry, flat: views of `data` if all of it is fp32."""
    if header.tensors.are_fp32:
        values = _values(data)
        return lambda entry: values[entry.start // 4 : entry.end // 4]
    body = _body(data)
    return lambda entry: _read_one(entry, data, body)


def _body(data: bytes) -> int:
    """Returns where the values of a safetensors file begin."""
    return 8 + int.from_bytes(data[:8], "little")


def _values(data: bytes) -> Vector:
    """Returns all values of a file that is fp32 throughout: a view, if this machine's order is."""
    return np.frombuffer(data, "<f4", offset=_body(data)).astype(np.float32, copy=False)


def _read_one(entry: TensorEntry, data: bytes, body: int) -> Vector:
    count = math.prod(entry.shape)
    if entry.dtype == "BF16":  # the upper half of an fp32 value
        halves = np.frombuffer(data, "<u2", count, body + entry.start).astype(np.uint32)
        return (halves << 16).view(np.float32)
    kind = "<f4" if entry.dtype == "F32" else "<f2"
    return np.frombuffer(data, kind, count, body + entry.start).astype(np.float32)


def check_file_values(header: Header, data: bytes, vectors: Vectors, head: HeadArrays) -> None:
    """Does what `check_values` does for what was read from `data`, at once where that is fp32."""
    if not (header.tensors.are_fp32 and _are_in_range(_values(data))):
        check_values(vectors, head)


def check_values(vectors: Vectors, head: HeadArrays = MappingProxyType({})) -> None:
    """Raises InvalidAdapterError for values that are not finite or exceed 1e4 in magnitude."""
    for name, array in head.items():
        if not _are_in_range(array):
            _find_bad_value(f"{HEAD_PREFIX}{name}", array.reshape(-1))
    if _are_in_range(np.concatenate([vector for pair in vectors.values() for vector in pair])):
        return
    for site, (scale, bias) in vectors.items():
        _find_bad_value(f"{site}.scale", scale)
        _find_bad_value(f"{site}.bias", bias)


def _are_in_range(values: NDArray[np.float32]) -> bool:
    # A NaN is the least and the greatest, and fails every comparison.
    return bool(values.min() >= -MAX_MAGNITUDE and values.max() <= MAX_MAGNITUDE)


def _find_bad_value(name: str, vector: Vector) -> None:
    wrong = np.flatnonzero(~np.isfinite(vector))
    if len(wrong):
        raise InvalidAdapterError(
            f"{shown(name)} has {len(wrong)} non-finite value(s), the first ({vector[wrong[0]]}) "
            f"at index {wrong[0]}"
        )
    index = int(np.abs(vector).argmax())
    if abs(vector[index]) > MAX_MAGNITUDE:
        raise InvalidAdapterError(
            f"{shown(name)} has the value {float(vector[index]):g} at index {index}; the largest "
            f"allowed magnitude is {MAX_MAGNITUDE:g}"
        )


def vector_bytes(vector: Vector) -> bytes:
    """Returns the fp32 values, row by row, as little-endian bytes, whatever the machine's order."""
    return _little(vector).tobytes()


def _little(array: NDArray[np.float32]) -> NDArray[np.float32]:
    return array if _IS_LITTLE else array.astype("<f4")


def digest_of(
    base_fingerprint: str,
    prompt_format: PromptFormat | None,
    vectors: Vectors,
    head_config: HeadConfig | None = None,
    head: HeadArrays = MappingProxyType({}),
    apply: str = ALL,
) -> str:
    """Returns "sha256:" and 64 hexadecimal digits over what decides the computation.

    The fields are length-prefixed, so that no two adapters share a serialisation; the vectors come
    in the order of the paths, after them the head, whose JSON no path can be taken for. Which
    tokens are edited follows unless that is all of them, behind a number that is no length.
    """
    prompt = b"" if prompt_format is None else prompt_format.canonical()
    parts: list[bytes | memoryview] = []
    for text in (_DIGEST_DOMAIN, base_fingerprint.encode(), prompt):
        parts += [len(text).to_bytes(8, "little"), text]
    for site, (scale, bias) in sorted(vectors.items()):
        before, between = _framing(site, scale.nbytes, bias.nbytes)
        parts += [before, _little(scale).data, between, _little(bias).data]
    if head_config is not None:
        text = json.dumps(head_config.to_json(), sort_keys=True, separators=(",", ":")).encode()
        parts += [len(text).to_bytes(8, "little"), text]
        for name, array in sorted(head.items()):
            text, data = name.encode(), _little(array).tobytes()
            parts += [len(text).to_bytes(8, "little"), text, len(data).to_bytes(8, "little"), data]
    if apply != ALL:
        parts += [b"\xff" * 8, apply.encode()]
    return f"sha256:{hashlib.sha256(b''.join(parts)).hexdigest()}"


@functools.lru_cache(maxsize=4096)
def _framing(site: str, scale_bytes: int, bias_bytes: int) -> tuple[bytes, bytes]:
    """Returns what a digest takes before the scale of a site, and between it and the bias."""
    path = site.encode()
    lengths = [size.to_bytes(8, "little") for size in (len(path), scale_bytes, bias_bytes)]
    return lengths[0] + path + lengths[1], lengths[2]
