"""GGUF files are converted once for each content and each version of the conversion."""

import os
import shutil
import time

import pytest
import torch
from gguf_files import chaining, write_gguf

from redmux.errors import FailedPreconditionError, InvalidArgumentError
from redmux_adapters import load_base, read_config
from redmux_adapters.bases import cache, gguf_model
from redmux_adapters.bases.load import check_tokenizer, load_tokenizer

TOKENS, MERGES = chaining("a 12")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("REDMUX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def clock(monkeypatch):
    """Lets files become old enough for their times to tell writes apart, and older."""
    real = time.time_ns
    ahead_ns = [10**10]
    monkeypatch.setattr(cache.time, "time_ns", lambda: real() + ahead_ns[0])
    monkeypatch.setattr(cache.time, "time", lambda: (real() + ahead_ns[0]) / 1e9)
    return ahead_ns


@pytest.fixture
def count_reads(monkeypatch):
    """The number of files that were read as a whole to know their content."""
    reads = []
    digest = cache.hashlib.file_digest

    def counting(file, name):
        reads.append(file.name)
        return digest(file, name)

    monkeypatch.setattr(cache.hashlib, "file_digest", counting)
    return reads


def model_file(path, seed=1, pre="smollm"):
    return write_gguf(path, TOKENS, MERGES, pre=pre, seed=seed)


def embeddings(path):
    return load_base(str(path))[0].get_input_embeddings().weight


def test_a_file_is_served_with_its_own_weights_and_ids(tmp_path):
    model, tokenizer = load_base(str(model_file(tmp_path / "m.gguf")))
    assert model.config.vocab_size == len(TOKENS)
    assert tokenizer.convert_ids_to_tokens(tokenizer("a 12").input_ids) == ["a", "Ġ", "1", "2"]


def test_weights_that_are_overwritten_in_place_are_those_that_load(tmp_path, folder, clock):
    path = model_file(tmp_path / "m.gguf", seed=1)
    first = embeddings(path)
    new = model_file(tmp_path / "new.gguf", seed=2)
    status = path.stat()
    with path.open("r+b") as file:  # same inode, size and beginning
        file.write(new.read_bytes())
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # as `cp -p` leaves it
    second = embeddings(path)
    assert not torch.equal(first, second)
    assert torch.equal(second, embeddings(new))
    assert len(list((folder / "gguf").glob("m-*"))) == 1  # that of the old content is gone


def test_a_file_is_read_as_a_whole_only_when_it_has_changed(tmp_path, clock, count_reads):
    path = model_file(tmp_path / "m.gguf")
    for _ in range(2):
        read_config(str(path))
        check_tokenizer(str(path))
    assert count_reads == [str(path)]
    os.utime(path, ns=(1, 1))
    read_config(str(path))
    assert count_reads == [str(path)] * 2


def test_a_file_that_was_just_written_is_read_again(tmp_path, count_reads):
    """A write in the same tick of the clock would leave no trace in its times."""
    path = tmp_path / "m.gguf"
    path.write_bytes(b"x")
    for _ in range(2):
        cache.digest_of_content(path)
    assert count_reads == [str(path)] * 2


def test_a_copy_of_a_file_is_not_converted_again(tmp_path, folder):
    path = model_file(tmp_path / "m.gguf")
    read_config(str(path))
    (tmp_path / "other").mkdir()
    read_config(str(shutil.copy(path, tmp_path / "other" / "m.gguf")))
    assert len(list((folder / "gguf").iterdir())) == 1


def test_a_mended_conversion_reaches_what_was_converted_before(tmp_path, folder, monkeypatch):
    path = model_file(tmp_path / "m.gguf")
    read_config(str(path))
    (old,) = (folder / "gguf").iterdir()
    (old / "tokenizer.json").unlink()
    monkeypatch.setattr(gguf_model, "_conversion", lambda: "mended")
    assert load_tokenizer(str(path))("a 12").input_ids
    assert old.is_dir()  # another version of redmux may use it


@pytest.mark.parametrize("changed", ["gguf_model.py", "gguf_tokenizer.py", "transformers"])
def test_the_version_of_the_conversion_is_its_code_and_that_of_transformers(
    tmp_path, monkeypatch, changed
):
    for name in ("gguf_model.py", "gguf_tokenizer.py"):
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(gguf_model, "__file__", str(tmp_path / "gguf_model.py"))
    versions = {"transformers": "1"}
    monkeypatch.setattr(gguf_model, "version", versions.get)
    before = gguf_model._conversion.__wrapped__()
    if changed in versions:
        versions[changed] = "2"
    else:
        (tmp_path / changed).write_text("2")
    assert gguf_model._conversion.__wrapped__() != before


def test_what_nobody_has_used_for_a_month_goes_when_something_new_comes(tmp_path, folder, clock):
    paths = [model_file(tmp_path / f"{name}.gguf", seed) for seed, name in enumerate("abc")]
    for path in paths[:2]:
        read_config(str(path))
    left = folder / "gguf" / ".b-left-by-a-killed-process"
    left.mkdir()
    clock[0] += int(20 * 86400e9)
    read_config(str(paths[0]))
    clock[0] += int(20 * 86400e9)
    read_config(str(paths[2]))
    names = sorted(path.name[:2] for path in (folder / "gguf").iterdir())
    assert names == ["a-", "c-"]


def test_a_tokenizer_that_is_not_known_is_refused_before_the_weights_are_converted(
    tmp_path, folder
):
    path = model_file(tmp_path / "m.gguf", pre="telepathy")
    for ask in (check_tokenizer, load_tokenizer, load_base):
        with pytest.raises(InvalidArgumentError, match=r"telepathy.*--tokenizer"):
            ask(str(path))
    assert not (folder / "gguf").exists()
    assert read_config(str(path)).vocab_size == len(TOKENS)  # what needs no text works
    for ask in (check_tokenizer, load_tokenizer, load_base):
        with pytest.raises(InvalidArgumentError, match=r"telepathy.*--tokenizer"):
            ask(str(path))


def test_the_original_tokenizer_may_be_given(tmp_path):
    path = model_file(tmp_path / "m.gguf", pre="telepathy")
    original = tmp_path / "original"
    load_tokenizer(str(model_file(tmp_path / "known.gguf"))).save_pretrained(original)
    check_tokenizer(str(path), str(original))
    _, tokenizer = load_base(str(path), tokenizer=str(original))
    assert tokenizer("a 12").input_ids == load_tokenizer(str(original))("a 12").input_ids


def test_a_tokenizer_of_a_larger_model_is_refused(tmp_path):
    path = model_file(tmp_path / "m.gguf")
    tokenizer = load_tokenizer(str(path))
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(tmp_path / "larger")
    with pytest.raises(InvalidArgumentError, match=rf"tokens up to {len(TOKENS)}, .*model"):
        load_base(str(path), tokenizer=str(tmp_path / "larger"))


def test_a_cache_that_cannot_be_written_is_named_with_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("REDMUX_CACHE", str(tmp_path / "file" / "cache"))
    path = model_file(tmp_path / "m.gguf")
    with pytest.raises(FailedPreconditionError, match="REDMUX_CACHE"):
        load_base(str(path))
