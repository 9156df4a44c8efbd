"""Hostile and broken safetensors files, and what each is told."""

import json
import time

import pytest

from redmux.errors import InvalidAdapterError
from redmux_adapters import Limits, parse_adapter, summarize
from redmux_adapters.format.header import read_header

CONFIG = '{"peft_type": "RED", "base_fingerprint": "b"}'


def container(header, body=b"\0" * 16):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def entry(**changes):
    return {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **changes}


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", "0 bytes are no safetensors file"),
        (b"\xff" * 8, r"claims 18446744073709551615 bytes; limit 524288"),
        (b"PK\x03\x04" + b"\0" * 100, "looks like a file of torch.save, try `redmux adapters conv"),
        (b"\x80\x02}q\x00" + b"\0" * 100, "looks like a file of torch.save"),
        (container(b'{"a.scale": [-0]}'), "-0 is no integer"),
        (container({"a.scale": entry()})[:40], r"claims \d+ bytes, the file has 32"),
        (container({"a.scale": entry(data_offsets=[-16, 0])}), "two numbers from 0 on"),
        (container({"a.scale": entry(shape=[-4], data_offsets=[16, 0])}), r"shape \[-4\]; it has"),
        (container(b" {}"), r"does not start with '\{'"),
        (container({"a.scale": entry(data_offsets=[0, 12])}), "12 bytes .* takes 16"),
        (container({"a.scale": entry()}, b"\0" * 12), "end at byte 16 of 12; the file is cut"),
        (container({"a.scale": entry()}, b"\0" * 20), "end at byte 16 of 20"),
        (container({}), "no tensors"),
        (container({"a.scale": entry(shape=[1, 4])}), r"shape \[1, 4\]; it has to be \[outputs"),
        (container({"a.scale": entry(shape=[True])}), r"shape \[True\]"),
        (container({"a.scale": entry(shape=[0], data_offsets=[0, 0])}, b""), "shape .* above 0"),
        (container({"a.scale": entry(shape=[2**60])}), "takes 4611686018427387904"),
        (container({"a.scale": entry(shape=[1] * 200)}), r"shape \[1, 1.*\.\.\.;"),
        (container({"a.scale": entry(dtype="F64")}), "dtype 'F64'; allowed are F32, F16, BF16"),
        (container({"a.scale": entry(extra=1)}), "exactly the keys dtype, shape and data_offsets"),
        (container({"a.weight": entry()}), "end in .scale or .bias, and `redmux adapters convert`"),
        (container({"head.a.weight": entry()}), "the file has a head and no edits"),
        (container({"head.weight": entry()}), "unexpected tensor 'head.weight'; those of a head"),
        (container({"head.a.scale": entry()}), "unexpected tensor 'head.a.scale'; those of a hea"),
        (container({"head.../a.bias": entry()}), "unexpected tensor 'head.../a.bias'"),
        (container({"head.a.bias": entry(shape=[1, 2, 2])}), r"shape \[1, 2, 2\]; .* inputs\]"),
        (container({"head.a.bias": entry(shape=[4, 0])}), r"shape \[4, 0\]; it has to be \["),
        (container({"head.a.bias": entry(shape=[2**40] * 2)}), "takes 48357032784585"),
        (container({"../../etc/passwd.scale": entry()}), "no module path"),
        (container({"a\0.scale": entry()}), r"'a\\x00' is no module path"),
        (container({"\u0430.scale": entry()}), r"'\\u0430' is no module path"),
        (container({"x" * 5000: entry()}), r"unexpected tensor 'x{70,79}\.\.\.;"),
        (container({"__metadata__": {"a": "b"}, "a.bias": entry()}), "unknown key 'a' in __meta"),
        (container({"__metadata__": {"format": "np"}, "a.bias": entry()}), 'has to be "pt"'),
        (
            container({"a.scale": entry(), "a.bias": entry()}),
            "'a.bias' starts at byte 0 and overlaps another tensor; expected 16",
        ),
        (
            container({"a.scale": entry(data_offsets=[4, 20])}, b"\0" * 20),
            "starts at byte 4 and leaves a hole; expected 0",
        ),
        (container(b'{"a.scale": {"dtype": 1, "dtype": 2}}'), "duplicate key 'dtype' in the safe"),
        (container(b'{"a.scale": 1, "a.scale": 2}'), "duplicate key 'a.scale'"),
        (
            container(b'{"__metadata__": {"format": "pt", "format": "pt"}}'),
            "duplicate key 'format'",
        ),
        (container(b"{\xff}"), "not UTF-8: bad byte at 1"),
        (container(b'{"a": ' + b"[" * 200_000 + b"}"), "nested too deeply|not valid JSON"),
        (container(b'{"a": ' + b"9" * 500_000 + b"}"), "a number of 500000 digits"),
    ],
)  # fmt: skip
def test_attacks_are_named(data, error):
    with pytest.raises(InvalidAdapterError, match=error):
        parse_adapter(data, CONFIG)
    with pytest.raises(InvalidAdapterError, match=error):
        summarize(data, CONFIG)


def test_a_second_metadata_is_found_where_the_first_is_remembered():
    usual = b'{"__metadata__":{"format":"pt"},"a.scale":' + json.dumps(entry()).encode() + b"}"
    read_header(container(usual))
    twice = usual[:-1] + b',"__metadata__":{"format":"pt"}}'
    with pytest.raises(InvalidAdapterError, match="duplicate key '__metadata__'"):
        read_header(container(twice))


def test_remembered_tensors_are_checked_against_every_file():
    usual = b'{"__metadata__":{"format":"pt"},"a.scale":' + json.dumps(entry()).encode() + b"}"
    assert list(read_header(container(usual)).tensors.edits) == ["a.scale"]
    with pytest.raises(InvalidAdapterError, match="end at byte 16 of 12"):
        read_header(container(usual, b"\0" * 12))
    with pytest.raises(InvalidAdapterError, match="1 tensors; limit 0"):
        read_header(container(usual), Limits(num_tensors=0))


def test_a_header_length_that_looks_like_a_pickle_is_fine():
    text = json.dumps({"a.scale": entry()}).encode().ljust(0x280)
    data = container(text)
    assert data.startswith(b"\x80\x02")
    assert list(read_header(data).tensors.edits) == ["a.scale"]


def many_tensors(count):
    entries = {
        f"l{i}.scale": entry(shape=[1], data_offsets=[4 * i, 4 * i + 4]) for i in range(count)
    }
    return container(entries, b"\0" * 4 * count)


def test_a_hundred_thousand_tensors_are_refused_unread():
    data = many_tensors(100_000)
    start = time.process_time()
    with pytest.raises(InvalidAdapterError, match=r"claims \d+ bytes; limit 524288"):
        parse_adapter(data, CONFIG)
    assert time.process_time() - start < 0.1


def test_tensor_count_is_limited_where_the_header_is_not():
    with pytest.raises(InvalidAdapterError, match="has 5000 tensors; limit 4096"):
        parse_adapter(many_tensors(5000), CONFIG, limits=Limits(header_bytes=64 << 20))


def test_total_size_is_limited_before_anything_else():
    with pytest.raises(InvalidAdapterError, match="has 100 bytes; limit 99"):
        parse_adapter(b"x" * 100, CONFIG, limits=Limits(file_bytes=99))
