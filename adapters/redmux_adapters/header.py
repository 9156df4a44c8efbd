"""The safetensors container, checked in pure Python before any parser sees the bytes.

The safetensors library is safe against code, not against waste or ambiguity: it accepts duplicate
names and metadata keys, names such as "../../etc/passwd" and a million tensors. This reader accepts
exactly what redmux writes, and what others write in the same layout.
"""

import contextlib
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from redmux.errors import InvalidAdapterError

from .strictjson import parse_json, shown

MAX_SITE_CHARS = 256
_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}
_METADATA_KEYS = ("format", "adapter_config")
_PATH_CHARS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_")
_METADATA_FIRST = b'{"__metadata__":'
_WHAT = "the safetensors header"
_JSON = json.JSONDecoder()


@dataclass(frozen=True)
class Limits:
    """Sizes above which a file is refused unread."""

    file_bytes: int = 64 << 20
    header_bytes: int = 512 << 10
    config_bytes: int = 256 << 10
    num_tensors: int = 4096


@dataclass(frozen=True)
class TensorEntry:
    """One vector of the file; `start` and `end` count from the end of the header."""

    dtype: str
    dim: int
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """A header that has passed every check; tensors in the order of the file's header."""

    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]


def read_header(data: bytes, limits: Limits = Limits()) -> Header:
    """Returns the header of a safetensors file, or raises InvalidAdapterError with the fault."""
    if len(data) > limits.file_bytes:
        raise InvalidAdapterError(
            f"the safetensors file has {len(data)} bytes; limit {limits.file_bytes}"
        )
    if len(data) < 8:
        raise InvalidAdapterError(
            f"{len(data)} bytes are no safetensors file; it starts with an 8-byte header length"
        )
    length = int.from_bytes(data[:8], "little")
    if length > limits.header_bytes:
        hint = "is it a safetensors file?"
        if data.startswith((b"PK\x03\x04", b"\x80\x02")):
            hint = "it looks like a file of torch.save, try `redmux adapters convert`"
        raise InvalidAdapterError(
            f"{_WHAT} claims {length} bytes; limit {limits.header_bytes}; {hint}"
        )
    if 8 + length > len(data):
        raise InvalidAdapterError(f"{_WHAT} claims {length} bytes, the file has {len(data) - 8}")
    raw = data[8 : 8 + length]
    if not raw.startswith(b"{"):
        raise InvalidAdapterError(f"{_WHAT} does not start with '{{'")
    num_bytes = len(data) - 8 - length
    split = _split(raw)
    if split is not None:
        with contextlib.suppress(InvalidAdapterError):
            metadata = _check_metadata(parse_json(split[0], _WHAT))
            return Header(_known_tensors(split[1], num_bytes, limits.num_tensors), metadata)
        # Read as a whole, the header names the fault and its place.
    entries = parse_json(raw, _WHAT)
    metadata = _check_metadata(entries.pop("__metadata__", {}))
    return Header(_check_tensors(entries, num_bytes, limits.num_tensors), metadata)


def write_container(tensors: Mapping[str, bytes], metadata: Mapping[str, str]) -> bytes:
    """Returns a safetensors file of fp32 vectors (little-endian bytes), sorted by name.

    Equal input gives equal bytes, which the safetensors library does not promise: it shuffles the
    metadata.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name in sorted(tensors):
        end = offset + len(tensors[name])
        header[name] = {
            "dtype": "F32",
            "shape": [len(tensors[name]) // 4],
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(tensors[n] for n in sorted(tensors))


def split_name(name: str) -> tuple[str, str]:
    """Returns (site, "scale" or "bias") of a tensor's name, or raises InvalidAdapterError."""
    site, _, kind = name.rpartition(".")
    if kind not in ("scale", "bias"):
        raise InvalidAdapterError(f"unexpected tensor {shown(name)}; names end in .scale or .bias")
    check_site(site)
    return site, kind


def check_site(site: str) -> None:
    """Raises InvalidAdapterError unless `site` is a module path of [A-Za-z0-9_] parts and dots."""
    if not site or len(site) > MAX_SITE_CHARS:
        raise InvalidAdapterError(
            f"module path {shown(site)} has {len(site)} characters; allowed are 1 to "
            f"{MAX_SITE_CHARS}"
        )
    if not all(part and _PATH_CHARS.issuperset(part) for part in site.split(".")):
        raise InvalidAdapterError(
            f"{shown(site)} is no module path; it has to be parts of A-Z a-z 0-9 _ joined by dots, "
            "such as 'model.layers.0.mlp.down_proj'"
        )


def _split(raw: bytes) -> tuple[str, str] | None:
    """Splits the header of a usual writer: the metadata, which comes first, and all the rest.

    The rest is the same text in every adapter of the same sites. Returns None for other headers;
    neither part is checked yet.
    """
    if not raw.startswith(_METADATA_FIRST):
        return None
    try:
        text = raw.decode("utf-8")
        _, end = _JSON.raw_decode(text, len(_METADATA_FIRST))
    except (ValueError, RecursionError):
        return None
    if not text.startswith(",", end):
        return None
    return text[len(_METADATA_FIRST) : end], text[end + 1 :]


@functools.lru_cache(maxsize=32)
def _known_tensors(rest: str, num_bytes: int, limit: int) -> Mapping[str, TensorEntry]:
    """Returns the checked entries of a header's text after its metadata.

    Remembered, since this is most of the work of reading a header.
    """
    entries = parse_json(f"{{{rest}", _WHAT)
    if "__metadata__" in entries:
        raise InvalidAdapterError(f"duplicate key '__metadata__' in {_WHAT}")
    return MappingProxyType(_check_tensors(entries, num_bytes, limit))


def _check_tensors(
    entries: Mapping[str, object], num_bytes: int, limit: int
) -> dict[str, TensorEntry]:
    if not entries:
        raise InvalidAdapterError("the file has no tensors; name them '<module path>.scale'")
    if len(entries) > limit:
        raise InvalidAdapterError(f"the file has {len(entries)} tensors; limit {limit}")
    tensors = {name: _check_entry(name, entry) for name, entry in entries.items()}
    _check_layout(tensors, num_bytes)
    return tensors


def _check_metadata(metadata: object) -> dict[str, str]:
    if not isinstance(metadata, dict):
        raise InvalidAdapterError(f"__metadata__ is {shown(metadata)}; it has to be an object")
    for key, value in metadata.items():
        if key not in _METADATA_KEYS:
            raise InvalidAdapterError(
                f"unknown key {shown(key)} in __metadata__; known: {', '.join(_METADATA_KEYS)}"
            )
        if not isinstance(value, str):
            raise InvalidAdapterError(f"__metadata__ {key} is {shown(value)}; strings only")
    if metadata.get("format", "pt") != "pt":
        raise InvalidAdapterError(
            f'__metadata__ format is {shown(metadata["format"])}; it has to be "pt"'
        )
    return metadata


def _check_entry(name: str, entry: object) -> TensorEntry:
    split_name(name)
    if not isinstance(entry, dict) or set(entry) != _ENTRY_KEYS:
        found = sorted(entry) if isinstance(entry, dict) else entry
        raise InvalidAdapterError(
            f"the entry of {shown(name)} has {shown(found)}; it has to have exactly the keys "
            "dtype, shape and data_offsets"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise InvalidAdapterError(
            f"{shown(name)} has dtype {shown(dtype)}; allowed are {', '.join(_ITEM_BYTES)}"
        )
    if not _is_ints(shape, 1) or shape[0] == 0:
        raise InvalidAdapterError(
            f"{shown(name)} has shape {shown(shape)}; it has to be [outputs of the module], one "
            "number above 0"
        )
    if not _is_ints(offsets, 2):
        raise InvalidAdapterError(
            f"{shown(name)} has data_offsets {shown(offsets)}; they have to be two numbers "
            "from 0 on"
        )
    start, end = offsets
    size = shape[0] * _ITEM_BYTES[dtype]
    if end - start != size:
        raise InvalidAdapterError(
            f"{shown(name)} has {end - start} bytes by its data_offsets {shown(offsets)}; shape "
            f"{shown(shape)} of {dtype} takes {size}"
        )
    return TensorEntry(dtype, shape[0], start, end)


def _check_layout(tensors: Mapping[str, TensorEntry], num_bytes: int) -> None:
    """Checks that the vectors lie end to end and fill the `num_bytes` behind the header."""
    position = 0
    for name, entry in sorted(tensors.items(), key=lambda item: item[1].start):
        if entry.start != position:
            fault = "leaves a hole" if entry.start > position else "overlaps another tensor"
            raise InvalidAdapterError(
                f"{shown(name)} starts at byte {entry.start} and {fault}; expected {position}"
            )
        position = entry.end
    if position != num_bytes:
        raise InvalidAdapterError(
            f"the tensors end at byte {position} of {num_bytes}; the file is cut or has "
            "surplus bytes"
        )


def _is_ints(value: object, count: int) -> bool:
    """Whether `value` is a list of `count` numbers from 0 on, where true is no number."""
    return (
        isinstance(value, list)
        and len(value) == count
        and all(type(item) is int and item >= 0 for item in value)
    )
