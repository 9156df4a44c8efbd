"""Database: where the registry's tables are, one writer and any number of readers."""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.pool import QueuePool, StaticPool

from redmux.errors import DataLossError, FailedPreconditionError, InvalidArgumentError, RedmuxError
from redmux_server.durable import sync_folder
from redmux_server.registry.database_errors import told
from redmux_server.registry.migrate import migrate
from redmux_server.registry.schema import metadata

logger = logging.getLogger(__name__)

T = TypeVar("T")

FILE_NAME = "registry.db"
_DRIVER = "postgresql+psycopg"
_READERS = 4
# A connection may break between a commit and the news of it.
_PERHAPS = "its database does not answer, unless it had taken the change before"
_CONNECT_S = 5
_STATEMENT_MS = 30_000
_LOCK_KEY = 0x7265646D7578  # "redmux": of the lock that one writer holds in PostgreSQL


class Database:
    """Transactions over the registry's tables, in SQLite or PostgreSQL.

    Writes run one after the other in a thread of their own, and so they do across all servers of
    one database. What has been written when `write` returns is durable. Reads see what was written
    before they began; SQLite's take microseconds and run where they are asked for, PostgreSQL's run
    in threads.
    """

    def __init__(self, engine: Engine, place: str, *, is_shared: bool) -> None:
        """`place` is for people. `is_shared` says whether other servers may write there, too."""
        self.place = place
        self.is_shared = is_shared
        self._engine = engine
        self._is_alone = isinstance(engine.pool, StaticPool)
        self._serial = threading.Lock()  # of the only connection, where there is one
        self._writer = ThreadPoolExecutor(1, "registry writer")
        self._readers = ThreadPoolExecutor(_READERS, "registry reader")

    @classmethod
    def in_memory(cls) -> "Database":
        """Returns an empty one that is gone with the process."""
        engine = _sqlite("sqlite://", StaticPool, "MEMORY")
        metadata.create_all(engine)
        return cls(engine, "memory", is_shared=False)

    @classmethod
    def in_folder(cls, folder: Path) -> "Database":
        """Opens the one of a folder, which is this process's alone, and makes it if there is none.

        Raises FailedPreconditionError where it cannot be opened; never makes one in place of
        another.
        """
        path = folder / FILE_NAME
        with _opening(str(path)):
            if not path.exists():
                _make(path)
            elif path.stat().st_size == 0:
                raise FailedPreconditionError(_lost(path, "is empty"))
            engine = _sqlite(f"sqlite:///{path}", QueuePool, "WAL")
            _migrate_or_let_go(engine)
        return cls(engine, str(path), is_shared=False)

    @classmethod
    def at(cls, url: str) -> "Database":
        """Opens the one at a URL of PostgreSQL's, in which its tables are made if need be.

        Raises InvalidArgumentError for another URL, FailedPreconditionError where it cannot be
        opened.
        """
        parsed = check_url(url)
        place = parsed.render_as_string(hide_password=True)
        engine = create_engine(
            parsed.set(drivername=_DRIVER),
            pool_pre_ping=True, pool_size=_READERS + 1, hide_parameters=True,
            connect_args={
                "connect_timeout": _CONNECT_S,
                "options": f"-c statement_timeout={_STATEMENT_MS}",
            },
        )  # fmt: skip
        event.listen(engine, "begin", _begin_postgresql)
        with _opening(place):
            _migrate_or_let_go(engine)
        return cls(engine, place, is_shared=True)

    def read_now(self, function: Callable[[Connection], T]) -> T:
        """Returns what a function reads, in one transaction; blocks, from any thread."""
        with told("the registry cannot be read"), self._alone(), self._engine.connect() as c:
            return function(c)

    async def read(self, function: Callable[[Connection], T]) -> T:
        """Returns what a function reads, in one transaction, without holding up the event loop."""
        if not self.is_shared:
            return self.read_now(function)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._readers, self.read_now, function)

    async def write(self, function: Callable[[Connection], T]) -> T:
        """Returns what a function returns whose changes are durable then, or undone if it raises.

        It runs to its end though nobody may wait for it any more.
        """
        loop = asyncio.get_running_loop()
        return await asyncio.shield(loop.run_in_executor(self._writer, self.write_now, function))

    def write_now(self, function: Callable[[Connection], T]) -> T:
        """Does what `write` does; blocks."""
        engine = self._engine.execution_options(writes=True)
        with (
            told("the registry is not changed", _PERHAPS),
            self._alone(),
            engine.begin() as connection,
        ):
            return function(connection)

    def close(self) -> None:
        """Waits for changes that are being written; blocks."""
        self._writer.shutdown()
        self._readers.shutdown()
        self._engine.dispose()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        with self._serial if self._is_alone else contextlib.nullcontext():
            yield


def check_url(url: str) -> URL:
    """Returns the parts of a URL of PostgreSQL's; raises InvalidArgumentError for any other."""
    try:
        parsed = make_url(url)
    except ArgumentError:
        parsed = None
    if parsed is None or parsed.drivername not in ("postgresql", _DRIVER) or not parsed.database:
        raise InvalidArgumentError(
            f"registry has to be a URL like {_DRIVER}://user:password@host:5432/database"
        )
    return parsed


def _sqlite(url: str, pool: Any, journal: str) -> Engine:
    engine = create_engine(
        url, poolclass=pool, hide_parameters=True, connect_args={"check_same_thread": False}
    )

    @event.listens_for(engine, "connect")
    def connect(connection: Any, record: Any) -> None:
        connection.isolation_level = None  # sqlite3 would begin transactions by itself, and late
        for pragma in (
            f"journal_mode={journal}", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=10000",
        ):  # fmt: skip
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get("writes")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _begin_postgresql(connection: Connection) -> None:
    if connection.get_execution_options().get("writes"):
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK_KEY})")


def _migrate(engine: Engine) -> None:
    with engine.execution_options(writes=True).begin() as connection:
        migrate(connection)


def _migrate_or_let_go(engine: Engine) -> None:
    try:
        _migrate(engine)
    except BaseException:
        engine.dispose()
        raise


def _make(path: Path) -> None:
    """Makes an empty registry, which is there as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for name in (f"{path.name}-wal", f"{path.name}-shm"):
        if path.with_name(name).exists():
            raise FailedPreconditionError(_lost(path, f"is gone, though {name} is there"))
    partial = path.with_name(f".{path.name}.tmp")
    partial.unlink(missing_ok=True)
    engine = _sqlite(f"sqlite:///{partial}", QueuePool, "DELETE")
    _migrate(engine)
    engine.dispose()
    partial.rename(path)
    sync_folder(path.parent)
    logger.info("made an empty registry of adapters, %s", path)


def _lost(path: Path, what: str) -> str:
    return (
        f"{path} {what}; restore it from a backup, or move everything of that name away to begin "
        "with an empty registry"
    )


@contextlib.contextmanager
def _opening(place: str) -> Iterator[None]:
    """Turns whatever keeps a registry from being opened into an error that ends the start."""
    try:
        with told("the registry cannot be opened"):
            yield
    except DataLossError as err:
        raise FailedPreconditionError(
            f"{place} is damaged or no registry: {err.message}; restore it from a backup"
        ) from None
    except RedmuxError as err:
        raise FailedPreconditionError(f"registry {place}: {err.message}") from None
    except OSError as err:
        raise FailedPreconditionError(f"registry {place} cannot be opened: {err}") from None
