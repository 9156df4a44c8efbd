"""The container check against a slow checker that was written separately."""

import contextlib
import json
import re

import pytest
import safetensors
from hypothesis import example, given, settings
from hypothesis import strategies as st

from redmux.errors import InvalidAdapterError
from redmux_adapters import parse_adapter
from redmux_adapters.format.header import read_header, write_container

CONFIG = '{"peft_type": "RED", "base_fingerprint": "b"}'
SIZES = {"F32": 4, "F16": 2, "BF16": 2}


class Draft:
    """A file in the making. Objects are lists of pairs, so that keys can repeat."""

    def __init__(self, vectors):
        self.metadata = [("format", "pt")]
        self.entries = []
        offset = 0
        for name, dtype, dim in vectors:
            end = offset + dim * SIZES[dtype]
            fields = [("dtype", dtype), ("shape", [dim]), ("data_offsets", [offset, end])]
            self.entries.append((name, fields))
            offset = end
        self.body = b"\0" * offset
        self.before, self.after = b"", b""
        self.length_error = 0

    def set(self, index, key, value):
        fields = self.entries[index][1]
        if isinstance(fields, list):
            fields[:] = [(k, value if k == key else v) for k, v in fields]

    def get(self, index, key):
        fields = self.entries[index][1]
        return dict(fields).get(key) if isinstance(fields, list) else None

    def to_bytes(self):
        pairs = [("__metadata__", self.metadata), *self.entries]
        header = self.before + render(pairs).encode("utf-8", "surrogatepass") + self.after
        length = max(0, len(header) + self.length_error)
        return length.to_bytes(8, "little") + header + self.body


def render(value):
    if isinstance(value, list) and value and all(isinstance(item, tuple) for item in value):
        inner = ",".join(f"{json.dumps(key)}:{render(item)}" for key, item in value)
        return "{" + inner + "}"
    return value if isinstance(value, Raw) else json.dumps(value)


class Raw(str):
    """Text that goes into the JSON as it is."""


NAMES = [
    "a.b.scale", "a.bias", "scale", ".scale", "a..scale", "a.weight", "a.scale.x", "../a.scale",
    "a/b.scale", "\u0430.scale", "a\0.scale", " a.scale", "a.scale\n", "", "x" * 300 + ".scale",
    "__metadata__.scale", "A_9.z.bias", "head.a.weight", "head.a.b.bias", "head.bias",
    "head.a.scale", "head..bias", "a.head.bias", "head", "a.Scale", "-.bias",
    "m\u00e9.bias", "0.scale",
]  # fmt: skip
DTYPES = ["F16", "BF16", "F32", "F64", "I8", "BOOL", "f32", "", 1, None, True, ["F32"]]
SHAPES = [
    [], [0], [2**60], [2**64], [-1], [True], [1.0], ["4"], [4, 1], [1, 4], [0, 2**60], None, 4,
    [None], [[4]], [2, 2], [1, 4, 1], [1], [2], [4], [10**30], {"4": 4}, [1] * 200,
]  # fmt: skip
OFFSETS = [
    [0, 0], [0, 4], [4, 8], [0, 16], [-4, 0], [8, 4], [0, 4.0], [False, 4], ["0", "4"], [0], None,
    [0, 4, 8], [2**63, 2**63 + 4], [0, 2**64], 0, [0, Raw("1e999")], [0, Raw("-0")],
    [0, Raw("NaN")], [1, 5],
]  # fmt: skip
ENTRIES = [None, [], 1, "x", [("dtype", "F32")], [("a", 1), ("a", 2)]]
METADATA = [
    None, [], 1, "x", [("format", "pt"), ("format", "pt")], [("format", "tf")], [("format", 1)],
    [("adapter_config", "{}")], [("adapter_config", None)], [("other", "x")],
    [("format", [("a", 1)])],
]  # fmt: skip


def is_one_number(shape):
    return isinstance(shape, list) and len(shape) == 1 and type(shape[0]) is int


def mutate(draft, kind, index, number):
    """Applies one fault, or one harmless change, to entry `index`."""
    name, fields = draft.entries[index]
    pick = {"name": NAMES, "dtype": DTYPES, "shape": SHAPES, "data_offsets": OFFSETS}.get(kind)
    value = pick[number % len(pick)] if pick else None
    match kind:
        case "name":
            draft.entries[index] = (value, fields)
        case "dtype" | "shape" | "data_offsets":
            draft.set(index, kind, value)
        case "entry":
            draft.entries[index] = (name, ENTRIES[number % len(ENTRIES)])
        case "metadata":
            draft.metadata = METADATA[number % len(METADATA)]
        case "repeat entry":
            draft.entries.append(draft.entries[index])
        case "alias entry":
            draft.entries.append((f"z{number}.scale", fields))
        case "empty alias":
            draft.entries.append(
                ("z.scale", [("dtype", "F32"), ("shape", [0]), ("data_offsets", [0, 0])])
            )
        case "remove entry":
            del draft.entries[index]
        case "swap entries":
            draft.entries.reverse()
        case "repeat field" if isinstance(fields, list) and fields:
            fields.append(fields[number % len(fields)])
        case "extra field" if isinstance(fields, list):
            fields.append(("strides", [1]))
        case "missing field" if isinstance(fields, list) and fields:
            del fields[number % len(fields)]
        case "half size, same bytes":
            shape = draft.get(index, "shape")
            if draft.get(index, "dtype") == "F32" and is_one_number(shape):
                draft.set(index, "dtype", "BF16")
                draft.set(index, "shape", [shape[0] * 2])
        case "shift offsets":
            offsets = draft.get(index, "data_offsets")
            if isinstance(offsets, list):
                moved = [o + number - 4 if type(o) is int else o for o in offsets]
                draft.set(index, "data_offsets", moved)
        case "longer body":
            draft.body += b"\0" * number
        case "shorter body":
            draft.body = draft.body[: len(draft.body) - number]
        case "wrong length":
            draft.length_error = number - 4
        case "huge length":
            draft.length_error = 2 ** (20 + number)
        case "before":
            draft.before = [b" ", b"\xef\xbb\xbf", b"[", b"\xff", b"\0"][number % 5]
        case "after":
            draft.after = [b" ", b"   ", b"\n", b"}", b"\xff", b"\0", b"{}", b","][number % 8]


KINDS = [
    "name", "dtype", "shape", "data_offsets", "entry", "metadata", "repeat entry", "alias entry",
    "empty alias", "remove entry", "swap entries", "repeat field", "extra field", "missing field",
    "half size, same bytes", "shift offsets", "longer body", "shorter body", "wrong length",
    "huge length", "before", "after",
]  # fmt: skip


def acceptable(data):
    """Whether the file is one that docs/format.md allows. Slow and simple: it counts each byte."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > 512 * 1024 or length > len(data) - 8:
        return False
    try:
        text = data[8 : 8 + length].decode()
        top = json.JSONDecoder(object_pairs_hook=tuple).decode(text)
    except ValueError:
        return False
    if text[:1] != "{" or repeats(top):
        return False
    tensors = dict(top)
    metadata = tensors.pop("__metadata__", ())
    if not isinstance(metadata, tuple) or not all(isinstance(v, str) for _, v in metadata):
        return False
    metadata = dict(metadata)
    if set(metadata) - {"format", "adapter_config"} or metadata.get("format") not in (None, "pt"):
        return False
    uses = [0] * (len(data) - 8 - length)
    if all(name.startswith("head.") for name in tensors):
        return False
    return len(tensors) <= 4096 and all(
        fits(name, entry, uses) for name, entry in tensors.items()
    ) and set(uses) == {1}  # fmt: skip


def fits(name, entry, uses):
    site = r"(?!head\.)[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*\.(scale|bias)"
    in_head = r"head(\.[A-Za-z0-9_]+)+\.(weight|bias)"
    if not re.fullmatch(f"{site}|{in_head}", name):
        return False
    if len(name.rpartition(".")[0]) > 256 or not isinstance(entry, tuple):
        return False
    fields = dict(entry)
    if sorted(fields) != ["data_offsets", "dtype", "shape"]:
        return False
    columns = r"(?:, ([1-9][0-9]*))?" if name.startswith("head.") else "()"
    numbers = re.fullmatch(
        rf"\[([1-9][0-9]*){columns}\]\[([0-9]+), ([0-9]+)\]",
        f"{fields['shape']}{fields['data_offsets']}",
    )
    if not numbers or str(fields["dtype"]) not in SIZES:
        return False
    rows, columns, start, end = (int(text or 1) for text in numbers.groups())
    if end > len(uses) or end - start != rows * columns * SIZES[fields["dtype"]]:
        return False
    for position in range(start, end):
        uses[position] += 1
    return True


def repeats(value):
    if isinstance(value, tuple):
        keys = [key for key, _ in value]
        return len(set(keys)) < len(keys) or any(repeats(item) for _, item in value)
    return isinstance(value, list) and any(map(repeats, value))


def accepted(data):
    try:
        read_header(data)
    except InvalidAdapterError as err:
        message = err.message
    else:
        return True
    assert len(message) < 400
    assert message.isascii()
    return False


vectors = st.lists(
    st.tuples(
        st.sampled_from(
            ["a.scale", "a.bias", "b.c.scale", "b.c.bias", "d.0.e_1.bias", "head.a.weight"]
        ),
        st.sampled_from(sorted(SIZES)),
        st.integers(1, 5),
    ),
    min_size=1,
    max_size=4,
    unique_by=lambda vector: vector[0],
)
mutations = st.lists(
    st.tuples(st.sampled_from(KINDS), st.integers(0, 3), st.integers(0, 40)), max_size=3
)


def build(parts, changes):
    draft = Draft(parts)
    for kind, index, number in changes:
        if draft.entries:
            mutate(draft, kind, index % len(draft.entries), number)
    return draft.to_bytes()


@given(vectors, mutations)
@settings(deadline=None, database=None, max_examples=800)
def test_check_agrees_with_the_slow_checker_and_safetensors(parts, changes):
    data = build(parts, changes)
    assert accepted(data) == acceptable(data)
    if accepted(data):
        names = {name for name, _ in safetensors.deserialize(data)}
        tensors = read_header(data).tensors
        assert names == set(tensors.edits) | {f"head.{name}" for name in tensors.head}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_change_agrees_with_the_slow_checker(kind):
    parts = [("a.scale", "F32", 4), ("a.bias", "BF16", 4), ("b.bias", "F16", 1)]
    results = set()
    for number in range(41):
        for index in range(3):
            data = build(parts, [(kind, index, number)])
            assert accepted(data) == acceptable(data), (kind, index, number)
            results.add(accepted(data))
    harmless = kind in ("swap entries", "half size, same bytes")
    assert results == {True} if harmless else False in results


@given(st.binary(max_size=300))
@settings(deadline=None, database=None, max_examples=200)
@example(b"")
@example(b"\x02" + b"\0" * 7 + b"{}")
def test_arbitrary_bytes_raise_nothing_else(data):
    with pytest.raises(InvalidAdapterError):
        parse_adapter(data, CONFIG)


@given(st.data())
@settings(deadline=None, database=None, max_examples=300)
def test_flipped_bytes_raise_nothing_else(data):
    good = bytearray(write_container({"a.scale": bytes(16), "a.bias": bytes(16)}, {"format": "pt"}))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(InvalidAdapterError):
        parse_adapter(bytes(good), CONFIG)
