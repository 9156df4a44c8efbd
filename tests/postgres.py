"""A PostgreSQL server of the tests' own, in a temporary folder."""

import itertools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import psycopg

_USER = "postgres"  # who runs it where the tests run as root, whom it refuses


def missing():
    """Returns why there can be none here, "" where there can."""
    if _bin() is None:
        return "PostgreSQL is not installed (Debian's package postgresql)"
    if os.geteuid() == 0 and shutil.which("setpriv") is None:
        return "setpriv is not installed, and PostgreSQL does not run as root"
    return ""


def _bin():
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if found:
        return found[-1].parent
    path = shutil.which("initdb")
    return Path(path).parent if path else None


class PostgreSQL:
    """A server on a socket; `close` ends it and removes everything."""

    def __init__(self):
        self._folder = Path(tempfile.mkdtemp(prefix="rmxpg"))  # a socket's path has to be short
        self._folder.chmod(0o755)
        self._data = self._folder / "data"
        self._numbers = itertools.count()
        self._data.mkdir(mode=0o700)
        if os.geteuid() == 0:
            shutil.chown(self._folder, _USER)
            shutil.chown(self._data, _USER)
        self._run("initdb", "-A", "trust", "-U", "test", "-N", "-E", "UTF8", "--locale=C.UTF-8")
        self.start()

    def start(self):
        options = f"-c listen_addresses='' -c unix_socket_directories='{self._folder}' -c fsync=off"
        options += " -c shared_buffers=16MB"
        self._run("pg_ctl", "-w", "start", "-l", str(self._folder / "log"), "-o", options)

    def stop(self, mode="immediate"):
        self._run("pg_ctl", "-w", "stop", "-m", mode)

    def close(self):
        self.stop()
        shutil.rmtree(self._folder)

    def new_database(self):
        """Returns the URL of an empty database."""
        name = f"test{next(self._numbers)}"
        with self.connect("postgres") as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return f"postgresql+psycopg://test@/{name}?host={self._folder}"

    def connect(self, database):
        return psycopg.connect(
            host=str(self._folder), user="test", dbname=database, autocommit=True
        )

    def _run(self, program, *arguments):
        command = [str(_bin() / program), "-D", str(self._data), *arguments]
        if os.geteuid() == 0:
            who = (f"--reuid={_USER}", f"--regid={_USER}", "--clear-groups")
            command = ["setpriv", *who, *command]
        subprocess.run(command, check=True, cwd="/", stdout=subprocess.DEVNULL, timeout=60)
