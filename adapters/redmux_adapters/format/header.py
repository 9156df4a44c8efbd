"""The safetensors container, checked in pure Python before any parser sees the bytes.

The safetensors library is safe against code, not against waste or ambiguity: it accepts duplicate
names and metadata keys, names such as "../../etc/passwd" and a million tensors. This reader accepts
exactly what redmux writes, and what others write in the same layout.
"""

import contextlib
import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from redmux.errors import InvalidAdapterError

from .strictjson import parse_json, shown

MAX_SITE_CHARS = 256
_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}
_METADATA_KEYS = ("format", "adapter_config", "checksum", "owner")
HEAD_PREFIX = "head."
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
    """One tensor of the file; `start` and `end` count from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def dim(self) -> int:
        """The length of a vector."""
        return self.shape[0]


@dataclass(frozen=True, eq=False)
class Tensors:
    """The tensors of a file in the order of its header; files of the same sites share one."""

    edits: Mapping[str, TensorEntry]  # "<module path>.scale" or ".bias": a vector
    head: Mapping[str, TensorEntry]  # "dense.weight" and so on, without "head."

    @functools.cached_property
    def site_dims(self) -> Mapping[str, int]:
        """{module path: output size}, sorted by path; raises where scale and bias disagree."""
        dims: dict[str, int] = {}
        for name, entry in self.edits.items():
            site = name.rpartition(".")[0]
            if dims.setdefault(site, entry.dim) != entry.dim:
                raise InvalidAdapterError(
                    f"scale and bias of {shown(site)} have {dims[site]} and {entry.dim} values; "
                    "they have to be the same"
                )
        return MappingProxyType(dict(sorted(dims.items())))

    @functools.cached_property
    def pairs(self) -> Mapping[str, tuple[TensorEntry | None, TensorEntry | None]]:
        """{module path: its scale, its bias}, sorted by path; None for one that is not given."""
        pair_of = {
            site: (self.edits.get(f"{site}.scale"), self.edits.get(f"{site}.bias"))
            for site in self.site_dims
        }
        return MappingProxyType(pair_of)

    @functools.cached_property
    def are_fp32(self) -> bool:
        """Whether every tensor of the file is fp32."""
        return all(e.dtype == "F32" for e in (*self.edits.values(), *self.head.values()))


@dataclass(frozen=True)
class Header:
    """A header that has passed every check."""

    tensors: Tensors
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


def write_container(
    tensors: Mapping[str, bytes],
    metadata: Mapping[str, str],
    shapes: Mapping[str, Sequence[int]] = MappingProxyType({}),
) -> bytes:
    """Returns a safetensors file of fp32 tensors (little-endian bytes), sorted by name.

    Tensors without an entry in `shapes` are vectors. Equal input gives equal bytes, which the
    safetensors library does not promise: it shuffles the metadata.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name in sorted(tensors):
        end = offset + len(tensors[name])
        header[name] = {
            "dtype": "F32",
            "shape": list(shapes.get(name, [len(tensors[name]) // 4])),
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
        raise InvalidAdapterError(
            f"unexpected tensor {shown(name)}; names end in .scale or .bias, and `redmux adapters "
            "convert` takes what other libraries write"
        )
    check_site(site)
    return site, kind


def is_head(name: str) -> bool:
    """Whether `name`, a tensor's or a module path, belongs to a classification head."""
    return name.startswith(HEAD_PREFIX)


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
    if is_head(site):
        raise InvalidAdapterError(
            f"module path {shown(site)} starts with {HEAD_PREFIX!r}, which names the tensors of a "
            "classification head"
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
def _known_tensors(rest: str, num_bytes: int, limit: int) -> Tensors:
    """Returns the checked entries of a header's text after its metadata.

    Remembered, since this is most of the work of reading a header.
    """
    entries = parse_json(f"{{{rest}", _WHAT)
    if "__metadata__" in entries:
        raise InvalidAdapterError(f"duplicate key '__metadata__' in {_WHAT}")
    return _check_tensors(entries, num_bytes, limit)


def _check_tensors(entries: Mapping[str, object], num_bytes: int, limit: int) -> Tensors:
    if not entries:
        raise InvalidAdapterError("the file has no tensors; name them '<module path>.scale'")
    if len(entries) > limit:
        raise InvalidAdapterError(f"the file has {len(entries)} tensors; limit {limit}")
    tensors = {name: _check_entry(name, entry) for name, entry in entries.items()}
    _check_layout(tensors, num_bytes)
    edits = {name: entry for name, entry in tensors.items() if not is_head(name)}
    head = {
        name.removeprefix(HEAD_PREFIX): entry for name, entry in tensors.items() if is_head(name)
    }
    if not edits:
        raise InvalidAdapterError("the file has a head and no edits; an adapter edits a module")
    return Tensors(MappingProxyType(edits), MappingProxyType(head))


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
    if is_head(name):
        _check_head_name(name)
        max_dims, meaning = 2, "[outputs] or [outputs, inputs], numbers above 0"
    else:
        split_name(name)
        max_dims, meaning = 1, "[outputs of the module], one number above 0"
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
    if not any(_is_ints(shape, 1 + extra) for extra in range(max_dims)) or 0 in shape:
        raise InvalidAdapterError(f"{shown(name)} has shape {shown(shape)}; it has to be {meaning}")
    if not _is_ints(offsets, 2):
        raise InvalidAdapterError(
            f"{shown(name)} has data_offsets {shown(offsets)}; they have to be two numbers "
            "from 0 on"
        )
    start, end = offsets
    size = math.prod(shape) * _ITEM_BYTES[dtype]
    if end - start != size:
        raise InvalidAdapterError(
            f"{shown(name)} has {end - start} bytes by its data_offsets {shown(offsets)}; shape "
            f"{shown(shape)} of {dtype} takes {size}"
        )
    return TensorEntry(dtype, tuple(shape), start, end)


def _check_head_name(name: str) -> None:
    _, *parts = name.split(".")
    plain = len(name) <= MAX_SITE_CHARS and all(p and _PATH_CHARS.issuperset(p) for p in parts)
    if not plain or len(parts) < 2 or parts[-1] not in ("weight", "bias"):
        raise InvalidAdapterError(
            f"unexpected tensor {shown(name)}; those of a head are named as in transformers, such "
            "as 'head.dense.weight'"
        )


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
