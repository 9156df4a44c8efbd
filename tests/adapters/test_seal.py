"""The seal of stored files: no change of a bit goes unnoticed, and the owner is told."""

import hashlib
import json

import pytest
import torch

from redmux.errors import InvalidAdapterError
from redmux_adapters import (
    Adapter,
    AdapterMetadata,
    Edit,
    PromptFormat,
    Turn,
    parse_adapter,
    read_adapter,
    summarize,
    to_bytes,
)
from redmux_adapters.format.files import parse_known, summary_of
from redmux_adapters.format.header import write_container
from redmux_adapters.format.seal import owner_in


def sealed(adapter, owner):
    """The file of an adapter as servers of before kept it."""
    data, zeros = to_bytes(adapter), "0" * 64
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] |= {"checksum": zeros, "owner": owner}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file = len(text).to_bytes(8, "little") + text + data[end:]
    checksum = hashlib.sha256(file).hexdigest()
    field = '"checksum":"%s"'
    return file.replace((field % zeros).encode(), (field % checksum).encode())


READERS = {
    "parse": parse_adapter,
    "summarize": summarize,
    "parse known": lambda data: parse_known(data, summary_of(small()).config),
}


def small(**metadata):
    return Adapter(
        "tiny-1x1-0",
        {"a": Edit(torch.tensor([1.5, 2.0]), torch.tensor([0.5, -1.0]))},
        PromptFormat(user=Turn("<", ">"), assistant=Turn("", "")),
        AdapterMetadata(**{"description": 'says "checksum":"0" and "owner":"key-9"', **metadata}),
    )


def test_a_sealed_file_is_the_same_adapter():
    adapter = small()
    for owner in ("", "key-1"):
        data = sealed(adapter, owner)
        assert parse_adapter(data) == adapter
        assert summarize(data) == summarize(to_bytes(adapter))
        assert owner_in(data) == owner


@pytest.mark.parametrize("reader", READERS)
def test_every_flipped_bit_is_noticed_by_whoever_reads(reader):
    data = sealed(small(), "key-1")
    READERS[reader](data)
    for index in range(len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[index] ^= 1 << bit
            with pytest.raises(InvalidAdapterError):
                READERS[reader](bytes(damaged))


def test_a_file_without_a_seal_is_read_as_ever():
    data = to_bytes(small())
    assert parse_adapter(data) == small()
    assert owner_in(data) is None


def test_a_damaged_sealed_file_is_refused_with_the_reason(tmp_path):
    data = bytearray(sealed(small(), ""))
    data[-1] ^= 1
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(InvalidAdapterError, match="damaged: its bytes do not have the checksum"):
        read_adapter(path)


@pytest.mark.parametrize("checksum", ["", "0" * 64, "F" * 64, "x", "\ud800", "0" * 63 + "\n"])
def test_what_is_no_checksum_of_the_file_is_refused(checksum):
    config = '{"peft_type": "RED", "base_fingerprint": "tiny-1x1-0"}'
    metadata = {"adapter_config": config, "checksum": checksum.encode("utf-8", "replace").decode()}
    with pytest.raises(InvalidAdapterError, match="checksum"):
        parse_adapter(write_container({"a.scale": b"\0" * 8}, metadata))
    spaced = write_container({"a.scale": b"\0" * 8}, metadata | {"checksum": "0" * 64})
    with pytest.raises(InvalidAdapterError, match="checksum"):
        parse_adapter(spaced.replace(b'"checksum":"0', b'"checksum": "'))


def test_the_owner_of_a_damaged_file_is_found_in_its_header_only():
    data = sealed(small(), "key-1")
    assert owner_in(data[:-5]) == "key-1"
    assert owner_in(data.replace(b'"format"', b"'format'")) == "key-1"
    assert owner_in(to_bytes(small()) + b'"owner":"key-2"') is None
    assert owner_in(b"") is None
