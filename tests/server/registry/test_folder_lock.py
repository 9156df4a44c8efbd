"""One server for one adapter folder."""

import errno
import os
import re
import socket
import subprocess
import sys

import pytest

import redmux_server.app
from redmux.errors import FailedPreconditionError
from redmux_server.config import ServerConfig
from redmux_server.registry.folder_lock import FolderLock

_HOLDER = """
import sys
from pathlib import Path
from redmux_server.registry.folder_lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that has the folder."""
    command = [sys.executable, "-c", _HOLDER, str(tmp_path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


def test_a_folder_that_another_process_has_is_refused_with_its_pid(tmp_path, holder):
    place = f"pid {holder.pid} on {re.escape(socket.gethostname())}"
    with pytest.raises(FailedPreconditionError, match=place) as caught:
        FolderLock(tmp_path)
    assert str(tmp_path) in caught.value.message


def test_a_killed_process_has_nothing_any_more(tmp_path, holder):
    holder.kill()
    holder.wait()
    FolderLock(tmp_path).close()


async def test_the_folder_is_asked_for_before_the_model_loads(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(redmux_server.app, "load", None)
    with pytest.raises(FailedPreconditionError, match=f"pid {holder.pid}"):
        await redmux_server.app.Server.start(ServerConfig(data_dir=str(tmp_path)))


async def test_a_start_that_fails_gives_the_folder_back(tmp_path, monkeypatch):
    monkeypatch.setattr(redmux_server.app, "load", lambda *args: 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            await redmux_server.app.Server.start(ServerConfig(data_dir=str(tmp_path)))


def test_a_folder_is_free_once_it_was_released(tmp_path):
    folder = tmp_path / "new" / "folder"
    for _ in range(2):
        lock = FolderLock(folder)
        with pytest.raises(FailedPreconditionError, match=f"pid {os.getpid()}"):
            FolderLock(folder)
        lock.close()


@pytest.mark.parametrize("parent", [False, True])
def test_what_can_be_no_folder_is_told(parent, tmp_path):
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(FailedPreconditionError, match=f"data_dir: {path}"):
        FolderLock(path / "x" if parent else path)


def refuse(monkeypatch, number, *modes):
    """Lets no file be opened in these modes."""
    really = os.open

    def refusing(path, flags, *args, **options):
        if flags & os.O_ACCMODE in modes and str(path).endswith(".lock"):
            raise OSError(number, os.strerror(number), str(path))
        return really(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", refusing)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT])
def test_a_folder_that_cannot_be_written_to_is_served_without_a_lock(
    number, tmp_path, monkeypatch, caplog
):
    refuse(monkeypatch, number, os.O_RDWR, os.O_RDONLY)
    FolderLock(tmp_path).close()
    assert os.strerror(number) in caplog.text


def test_a_lock_that_is_somebody_elses_file_holds_all_the_same(tmp_path, holder, monkeypatch):
    refuse(monkeypatch, errno.EACCES, os.O_RDWR)
    with pytest.raises(FailedPreconditionError, match=f"pid {holder.pid}"):
        FolderLock(tmp_path)


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog):
    from redmux_server.registry import folder_lock

    def unsupported(*args):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(folder_lock.fcntl, "flock", unsupported)
    FolderLock(tmp_path).close()
    assert "cannot be locked" in caplog.text
