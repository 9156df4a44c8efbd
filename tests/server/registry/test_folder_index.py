"""The index of an adapter folder saves reading and never decides what is served."""

import json
import os

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
    return json.loads((folder / INDEX).read_text())


@pytest.mark.parametrize("key", ["version", "base"])
def test_the_index_of_another_version_or_base_is_not_used(
    key, tmp_path, open_registry, files, reads
):
    fill(tmp_path, files)
    open_registry(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps(entries_of(tmp_path) | {key: "other"}))
    del reads[:]
    assert open_registry(tmp_path).unusable == []
    assert sorted(reads) == ["a", "b", "c"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: b"", lambda text: text[: len(text) // 2], lambda text: b"\xff" + text,
        lambda text: b"[]", lambda text: b"1", lambda text: text.replace(b"RED", b"BLUE"),

        lambda text: json.dumps(json.loads(text) | {"files": {"a": [1, 2]}}).encode(),
        lambda text: json.dumps(json.loads(text) | {"files": {"a": [[1], 2, 3, 4, 5]}}).encode(),
        lambda text: json.dumps(json.loads(text) | {"files": [1]}).encode(),
    ],
)  # fmt: skip
def test_a_broken_index_costs_reading_and_nothing_else(
    damage, tmp_path, open_registry, adapters, files, reads
):
    fill(tmp_path, files)
    expected = digests(open_registry(tmp_path))
    path = tmp_path / INDEX
    path.write_bytes(damage(path.read_bytes()))
    del reads[:]
    assert digests(open_registry(tmp_path)) == expected
    assert sorted(reads) == ["a", "b", "c"]
    assert digests(open_registry(tmp_path)) == expected


def test_a_wrong_index_cannot_make_the_server_serve_wrong_vectors(
    tmp_path, open_registry, adapters, files
):
    fill(tmp_path, files)
    open_registry(tmp_path)
    table = entries_of(tmp_path)
    table["files"]["a"][1] = adapters[3].digest
    (tmp_path / INDEX).write_text(json.dumps(table))
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
    table["files"]["a"][:2] = [stamp, stranger.digest]
    (tmp_path / INDEX).write_text(json.dumps(table))
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
