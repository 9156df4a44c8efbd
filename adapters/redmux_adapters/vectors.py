"""The numbers of an adapter: read from a file's bytes, checked and hashed, all in NumPy.

A torch operation on a vector of a thousand values costs more than its arithmetic, and an adapter
has dozens of them; a server that checks ten thousand files at start cannot afford it.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from redmux.errors import InvalidAdapterError

from .head import HeadArrays, HeadConfig
from .header import HEAD_PREFIX, Header, TensorEntry
from .prompt import PromptFormat
from .strictjson import shown

MAX_MAGNITUDE = 1e4
_DIGEST_DOMAIN = b"redmux-adapter-v1"

Vector = NDArray[np.float32]
Vectors = Mapping[str, tuple[Vector, Vector]]  # module path -> scale, bias, each [dim]


def site_dims(header: Header) -> dict[str, int]:
    """Returns {module path: output size}, sorted by path; raises where scale and bias disagree."""
    dims: dict[str, int] = {}
    for name, entry in header.tensors.edits.items():
        site = name.rpartition(".")[0]
        if dims.setdefault(site, entry.dim) != entry.dim:
            raise InvalidAdapterError(
                f"scale and bias of {shown(site)} have {dims[site]} and {entry.dim} values; they "
                "have to be the same"
            )
    return dict(sorted(dims.items()))


def read_vectors(header: Header, data: bytes) -> Vectors:
    """Returns the vectors of a file whose header is checked; the values are not.

    They are views of `data` where that holds fp32, so they cannot be written to. A missing scale is
    1, a missing bias 0.
    """
    given = _read_all(header, header.tensors.edits, data)
    vectors = {}
    for site, dim in site_dims(header).items():
        scale, bias = given.get(f"{site}.scale"), given.get(f"{site}.bias")
        vectors[site] = (
            np.ones(dim, np.float32) if scale is None else scale,
            np.zeros(dim, np.float32) if bias is None else bias,
        )
    return vectors


def read_head(header: Header, data: bytes) -> HeadArrays:
    """Returns the tensors of the head in a file whose header is checked; the values are not."""
    entries = header.tensors.head
    flat = _read_all(header, entries, data)
    return {name: values.reshape(entries[name].shape) for name, values in flat.items()}


def _read_all(header: Header, entries: Mapping[str, TensorEntry], data: bytes) -> dict[str, Vector]:
    """Returns the values of `entries`, flat: views of `data` where the whole file is fp32."""
    body = 8 + int.from_bytes(data[:8], "little")
    everything = (*header.tensors.edits.values(), *header.tensors.head.values())
    if all(entry.dtype == "F32" for entry in everything):
        values = np.frombuffer(data, "<f4", offset=body).astype(np.float32, copy=False)
        return {name: values[e.start // 4 : e.end // 4] for name, e in entries.items()}
    return {name: _read_one(entry, data, body) for name, entry in entries.items()}


def _read_one(entry: TensorEntry, data: bytes, body: int) -> Vector:
    count = math.prod(entry.shape)
    if entry.dtype == "BF16":  # the upper half of an fp32 value
        halves = np.frombuffer(data, "<u2", count, body + entry.start).astype(np.uint32)
        return (halves << 16).view(np.float32)
    kind = "<f4" if entry.dtype == "F32" else "<f2"
    return np.frombuffer(data, kind, count, body + entry.start).astype(np.float32)


def check_values(vectors: Vectors, head: HeadArrays = MappingProxyType({})) -> None:
    """Raises InvalidAdapterError for values that are not finite or exceed 1e4 in magnitude."""
    for name, array in head.items():
        if not np.abs(array).max() <= MAX_MAGNITUDE:
            _find_bad_value(f"{HEAD_PREFIX}{name}", array.reshape(-1))
    flat = np.concatenate([vector for pair in vectors.values() for vector in pair])
    if np.abs(flat).max() <= MAX_MAGNITUDE:  # false where a NaN is
        return
    for site, (scale, bias) in vectors.items():
        _find_bad_value(f"{site}.scale", scale)
        _find_bad_value(f"{site}.bias", bias)


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
    return vector.astype("<f4", copy=False).tobytes()


def digest_of(
    base_fingerprint: str,
    prompt_format: PromptFormat | None,
    vectors: Vectors,
    head_config: HeadConfig | None = None,
    head: HeadArrays = MappingProxyType({}),
) -> str:
    """Returns "sha256:" and 64 hexadecimal digits over what decides the computation.

    The fields are length-prefixed, so that no two adapters share a serialisation; the vectors come
    in the order of the paths, after them the head, whose JSON no path can be taken for.
    """
    prompt = b"" if prompt_format is None else prompt_format.canonical()
    parts: list[bytes | memoryview] = []
    for text in (_DIGEST_DOMAIN, base_fingerprint.encode(), prompt):
        parts += [len(text).to_bytes(8, "little"), text]
    for site, pair in sorted(vectors.items()):
        path = site.encode()
        parts += [len(path).to_bytes(8, "little"), path]
        for vector in pair:
            parts += [vector.nbytes.to_bytes(8, "little"), vector.astype("<f4", copy=False).data]
    if head_config is not None:
        text = json.dumps(head_config.to_json(), sort_keys=True, separators=(",", ":")).encode()
        parts += [len(text).to_bytes(8, "little"), text]
        for name, array in sorted(head.items()):
            text, data = name.encode(), array.astype("<f4", copy=False).tobytes()
            parts += [len(text).to_bytes(8, "little"), text, len(data).to_bytes(8, "little"), data]
    return f"sha256:{hashlib.sha256(b''.join(parts)).hexdigest()}"
