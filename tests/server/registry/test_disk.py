"""What the system refuses is told with its reason, and changes nothing."""

import errno
import os
import resource
import tempfile
from pathlib import Path

import pytest

from redmux.errors import FailedPreconditionError, ResourceExhaustedError

SHORTAGES = [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE]
REFUSALS = [errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR]


def refusing(number):
    def refuse(*args, **options):
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.mark.parametrize("number", SHORTAGES + REFUSALS)
@pytest.mark.parametrize("place", ["mkstemp", "fsync", "rename"])
async def test_a_put_that_the_disk_refuses_says_why_and_leaves_all_as_it_was(
    place, number, tmp_path, open_registry, adapters, files, monkeypatch
):
    registry = open_registry(tmp_path)
    await registry.put("x", files[0], "", replace=False)
    owner = {"mkstemp": tempfile, "fsync": os, "rename": Path}[place]
    monkeypatch.setattr(owner, place, refusing(number))
    error = ResourceExhaustedError if number in SHORTAGES else FailedPreconditionError
    for name in ("x", "y"):
        with pytest.raises(error) as caught:
            await registry.put(name, files[1], "", replace=True)
        assert f"adapter {name!r} is not kept" in caught.value.message
        assert os.strerror(number) in caught.value.message
        assert str(tmp_path) not in caught.value.message
    monkeypatch.undo()
    for opened in (registry, open_registry(tmp_path)):
        assert [p.name for p in opened.page("", 9)] == ["x"]
        assert opened.resolve("x").read() == adapters[0]
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


async def test_a_delete_that_the_disk_refuses_says_why_and_deletes_nothing(
    tmp_path, open_registry, adapters, files, monkeypatch
):
    registry = open_registry(tmp_path)
    await registry.put("x", files[0], "", replace=False)
    monkeypatch.setattr(Path, "unlink", refusing(errno.EROFS))
    with pytest.raises(FailedPreconditionError, match=r"'x' is not deleted.*Read-only file system"):
        await registry.delete("x")
    monkeypatch.undo()
    assert registry.resolve("x").read() == adapters[0]
    await registry.delete("x")


async def test_a_limit_on_the_size_of_files_is_a_shortage(tmp_path, open_registry, adapters, files):
    registry = open_registry(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    try:
        with pytest.raises(ResourceExhaustedError, match="File too large"):
            await registry.put("x", files[0], "", replace=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    await registry.put("x", files[0], "", replace=False)
    assert open_registry(tmp_path).resolve("x").read() == adapters[0]


async def test_a_folder_in_the_place_of_the_file_is_told(tmp_path, open_registry, files):
    (tmp_path / "x.safetensors" / "y").mkdir(parents=True)
    registry = open_registry(tmp_path)
    with pytest.raises(FailedPreconditionError, match="Is a directory"):
        await registry.put("x", files[0], "", replace=False)


async def test_a_leftover_that_cannot_be_removed_stops_no_start(
    tmp_path, open_registry, adapters, files, monkeypatch, caplog
):
    await open_registry(tmp_path).put("x", files[0], "", replace=False)
    (tmp_path / ".y.tmp").write_bytes(b"")
    monkeypatch.setattr(Path, "unlink", refusing(errno.EROFS))
    assert open_registry(tmp_path).resolve("x").read() == adapters[0]
    assert f"cannot remove {tmp_path / '.y.tmp'}: Read-only file system" in caplog.text
