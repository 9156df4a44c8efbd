"""The index of an adapter folder saves reading and never decides what is served."""

import hashlib
import json
import os
import random
import re

import pytest

from redmux.errors import DataLossError
from redmux_adapters import to_bytes
from redmux_server.registry import folder as module
from redmux_server.registry.published import Published

INDEX = ".index.json"


@pytest.fixture(autouse=True)
def index_at_once(monkeypatch):
    """Few files are worth an index, and files count as settled at once."""
    monkeypatch.setattr(module, "_MANY", 1)
    monkeypatch.setattr(module, "_SETTLED_NS", -(10**18))


@pytest.fixture
def reads(monkeypatch):
    """The names of the files that starts read."""
    names, read_file = [], module.read_file

    def noting(path, limit):
        names.append(path.name.removesuffix(".safetensors"))
        return read_file(path, limit)

    monkeypatch.setattr(module, "read_file", noting)
    return names


def fill(folder, files, names="abc"):
    for name, data in zip(names, files, strict=False):
        (folder / f"{name}.safetensors").write_bytes(data)


def digests(registry):
    return {p.name: p.digest for p in registry.page("", 99)}


def test_an_unchanged_file_is_read_by_the_first_start_only(
    tmp_path, open_registry, adapters, files, reads
):
    fill(tmp_path, files)
    first = open_registry(tmp_path)
    assert sorted(reads) == ["a", "b", "c"]
    second = open_registry(tmp_path)
    assert sorted(reads) == ["a", "b", "c"]
    assert digests(second) == digests(first)
    assert [second.resolve(name).read() for name in "abc"] == adapters[:3]
    for name in "abc":
        assert second.resolve(name).summary == first.resolve(name).summary


async def test_what_was_put_is_indexed_when_the_server_stops(
    tmp_path, open_registry, adapters, files, reads
):
    registry = open_registry(tmp_path)
    await registry.put("a", files[0], "", replace=False)
    await registry.put("a", files[1], "", replace=True)
    registry.save_index()
    assert open_registry(tmp_path).resolve("a").read() == adapters[1]
    assert reads == []


def replaced(path, files):
    other = path.with_suffix(".new")
    other.write_bytes(files[3])
    os.replace(other, path)


def overwritten(path, files):
    with path.open("r+b") as file:
        file.write(files[3])


@pytest.mark.parametrize("change", [replaced, overwritten])
def test_a_changed_file_is_read_again(change, tmp_path, open_registry, adapters, files, reads):
    assert len(files[3]) == len(files[0])
    fill(tmp_path, files)
    open_registry(tmp_path)
    path = tmp_path / "a.safetensors"
    status = path.stat()
    change(path, files)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # as careless copying does
    del reads[:]
    assert open_registry(tmp_path).resolve("a").digest == adapters[3].digest
    assert reads == ["a"]


def test_a_file_that_cannot_be_used_is_reported_by_every_start(tmp_path, open_registry, files):
    fill(tmp_path, [files[0], files[1][:-1]])
    for _ in range(2):
        assert [path.name for path in open_registry(tmp_path).unusable] == ["b.safetensors"]


def test_a_file_that_was_written_a_moment_ago_is_not_indexed(
    tmp_path, open_registry, files, reads, monkeypatch
):
    monkeypatch.setattr(module, "_SETTLED_NS", 10**12)
    fill(tmp_path, files)
    open_registry(tmp_path)
    assert not (tmp_path / INDEX).exists()


def test_a_few_files_make_no_index(tmp_path, open_registry, files, monkeypatch):
    monkeypatch.setattr(module, "_MANY", 4)
    fill(tmp_path, files)
    open_registry(tmp_path)
    assert not (tmp_path / INDEX).exists()


def entries_of(folder):
    return {k: v for k, v in json.loads((folder / INDEX).read_text()).items() if k != "checksum"}


def write_table(folder, table):
    """Writes an index as the server would, whatever is in it."""
    text = table if isinstance(table, str) else json.dumps(table)
    (folder / INDEX).write_text(with_checksum(text))


def with_checksum(text):
    return f'{text[:-1]}, "checksum": "{hashlib.sha256(text[:-1].encode()).hexdigest()}"}}'


@pytest.mark.parametrize("key", ["version", "base"])
def test_the_index_of_another_version_or_base_is_not_used(
    key, tmp_path, open_registry, files, reads
):
    fill(tmp_path, files)
    open_registry(tmp_path)
    write_table(tmp_path, entries_of(tmp_path) | {key: "other"})
    del reads[:]
    assert open_registry(tmp_path).unusable == []
    assert sorted(reads) == ["a", "b", "c"]


def replaced_text(old, new):
    return lambda text: text.replace(old, new)


WHOLE = {  # what may be in the index's place
    "nothing": "", "no object": "[]", "a number": "1", "null": "null", "NaN": "NaN",
    "deep": "[" * 200_000, "deep and closed": "[" * 100_000 + "]" * 100_000,
}  # fmt: skip
FILES = {  # what may be in the place of its entries
    "null": "null", "list": "[1]", "numbers": '{"a": 1}', "short": '{"a": [1, 2]}',
    "nested stamp": '{"a": [[[1], 2, 3, 4], "", "x", 1, 2, 3, "{}"]}',
    "texts for numbers": '{"a": [["1", "2", "3", "4"], "", "x", "1", "2", "3", "{}"]}',
    "huge numbers": f'{{"a": [[{"9" * 5000}, 2, 3, 4], "", "x", 1, 2, 3, "{{}}"]}}',
    "NaN": '{"a": [[NaN, 2, 3, 4], "", "x", 1, 2, 3, "{}"]}',
    "infinite": '{"a": [[1e999, 2, 3, 4], "", "x", 1, 2, 3, "{}"]}',
    "true": '{"a": [[true, 2, 3, 4], "", "x", 1, 2, 3, "{}"]}',
    "no owner": '{"a": [[1, 2, 3, 4], null, "x", 1, 2, 3, "{}"]}',
    "deep": '{"a": ' + "[" * 50_000 + "]" * 50_000 + "}",
    "deep config": '{"a": [[1, 2, 3, 4], "", "x", 1, 2, 3, "' + "[" * 50_000 + '"]}',
    "other paths": '{"../../etc/passwd": [[1, 2, 3, 4], "", "x", 1, 2, 3, "{}"]}',
}  # fmt: skip
DAMAGES = {
    **{f"whole: {key}": lambda text, new=new: new.encode() for key, new in WHOLE.items()},
    **{
        f"whole, with checksum: {key}": lambda text, new=new: with_checksum(new).encode()
        for key, new in WHOLE.items()
    },
    **{
        f"files: {key}": lambda text, new=new: with_checksum(
            json.dumps(json.loads(text) | {"files": 0}).replace('"files": 0', f'"files": {new}')
        ).encode()
        for key, new in FILES.items()
    },
    "cut": lambda text: text[: len(text) // 2],
    "not UTF-8": lambda text: b"\xff" + text,
    "peft_type": replaced_text(b"RED", b"BLUE"),
    "digest": lambda text: re.sub(rb"sha256:.", b"sha256:x", text, count=1),
    "fingerprint": replaced_text(b"tiny-2x4-0", b"tiny-2x4-1"),
    "owner": replaced_text(b'"", "sha256', b'"key-1", "sha256'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_index_costs_reading_and_nothing_else(
    damage, tmp_path, open_registry, adapters, files, reads
):
    fill(tmp_path, files)
    expected = digests(open_registry(tmp_path))
    path = tmp_path / INDEX
    before = path.read_bytes()
    path.write_bytes(DAMAGES[damage](before))
    assert path.read_bytes() != before
    del reads[:]
    registry = open_registry(tmp_path)
    assert registry.unusable == []
    assert digests(registry) == expected
    assert sorted(reads) == ["a", "b", "c"]
    assert [registry.resolve(name, "somebody").read() for name in "abc"] == adapters[:3]
    assert digests(open_registry(tmp_path)) == expected


@pytest.mark.parametrize("seed", range(20))
def test_no_change_of_some_bytes_of_the_index_shows(seed, tmp_path, open_registry, adapters, files):
    fill(tmp_path, files)
    open_registry(tmp_path)
    path = tmp_path / INDEX
    rng, data = random.Random(seed), bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 1, 3, 30])):
        data[rng.randrange(len(data))] = rng.randrange(256)
    path.write_bytes(data)
    registry = open_registry(tmp_path)
    assert [registry.resolve(name, "somebody").read() for name in "abc"] == adapters[:3]


@pytest.mark.parametrize("thing", ["folder", "pipe", "link to nothing", "link to itself"])
def test_what_is_no_file_in_the_place_of_the_index_is_ignored(
    thing, tmp_path, open_registry, files
):
    fill(tmp_path, files)
    path = tmp_path / INDEX
    if thing == "folder":
        path.mkdir()
    elif thing == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(path if thing == "link to itself" else tmp_path / "nothing")
    assert len(open_registry(tmp_path)) == 3


def test_an_entry_that_would_be_refused_is_read_anew(tmp_path, open_registry, adapters, files):
    """Whatever an index says of a good file, with its checksum, cannot hide it."""
    fill(tmp_path, files)
    open_registry(tmp_path)
    table = entries_of(tmp_path)
    values = table["files"]["a"]
    values[-1] = values[-1].replace("tiny-2x4-0", "tiny-2x4-1")
    write_table(tmp_path, table)
    assert open_registry(tmp_path).resolve("a").read() == adapters[0]


def test_a_wrong_index_cannot_make_the_server_serve_wrong_vectors(
    tmp_path, open_registry, adapters, files
):
    fill(tmp_path, files)
    open_registry(tmp_path)
    table = entries_of(tmp_path)
    table["files"]["a"][2] = adapters[3].digest
    write_table(tmp_path, table)
    registry = open_registry(tmp_path)
    with pytest.raises(DataLossError):
        registry.resolve("a").read()
    assert registry.resolve("b").read() == adapters[1]


def test_an_indexed_file_is_checked_against_the_sites_when_it_is_read(
    tmp_path, open_registry, make_adapter, files
):
    """An index that somebody made up does not bring edits of modules that the base lacks."""
    stranger = make_adapter(0, sites={"model.layers.9.mlp.down_proj": 4})
    fill(tmp_path, files)
    open_registry(tmp_path)
    path = tmp_path / "a.safetensors"
    path.write_bytes(to_bytes(stranger))
    table = entries_of(tmp_path)
    status = path.stat()
    stamp = [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]
    table["files"]["a"][:3] = [stamp, "", stranger.digest]
    write_table(tmp_path, table)
    published = open_registry(tmp_path).resolve("a")
    assert isinstance(published, Published)
    with pytest.raises(DataLossError):
        published.read()


async def test_a_repaired_file_is_read_by_the_next_start(
    tmp_path, open_registry, adapters, files, reads
):
    fill(tmp_path, files)
    open_registry(tmp_path)
    registry = open_registry(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(files[0][:-1])
    await registry.put("a", files[0], "", replace=False)
    registry.save_index()
    del reads[:]
    assert open_registry(tmp_path).resolve("a").read() == adapters[0]
    assert reads == ["a"]


def test_an_index_that_cannot_be_written_stops_nothing(
    tmp_path, open_registry, files, monkeypatch, caplog
):
    from redmux_server.registry import folder_index

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    fill(tmp_path, files)
    monkeypatch.setattr(folder_index.tempfile, "mkstemp", full)
    assert len(open_registry(tmp_path)) == 3
    assert "No space left" in caplog.text
