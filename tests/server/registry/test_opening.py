"""Opening a registry: its tables are taken to today's, and what cannot be opened says so."""

import asyncio
import sqlite3
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, text

from redmux.errors import FailedPreconditionError, InvalidArgumentError
from redmux_server.registry.database import FILE_NAME, Database
from redmux_server.registry.migrate import migrate
from redmux_server.registry.schema import HEAD, metadata


def differences(registry):
    def read(connection):
        return compare_metadata(MigrationContext.configure(connection), metadata)

    return registry._database.read_now(read)


def test_migrations_make_the_tables_that_the_server_works_with(open_kept):
    assert differences(open_kept()) == []


def test_tables_of_the_first_version_are_taken_to_todays_with_what_they_hold(open_kept):
    place = open_kept.place
    if not isinstance(place, str):
        place = f"sqlite:///{place / FILE_NAME}"
    engine = create_engine(place)
    with engine.begin() as connection:
        migrate(connection, "0001")
        connection.execute(text("INSERT INTO tenants (name, created_us) VALUES ('old', 1)"))
    engine.dispose()
    registry = open_kept()
    assert differences(registry) == []
    for query, value in [("SELECT version_num FROM alembic_version", HEAD),
                         ("SELECT name FROM tenants", "old")]:  # fmt: skip
        assert registry._database.read_now(lambda c, q=query: c.execute(text(q)).scalar()) == value


def test_servers_that_start_at_once_make_the_tables_once(postgresql):
    place = postgresql.new_database()
    with ThreadPoolExecutor(4) as threads:
        opened = list(threads.map(Database.at, [place] * 4))
    for database in opened:
        database.close()


@pytest.mark.parametrize(("kind", "statement"), [
    ("write_now", "BEGIN IMMEDIATE"), ("read_now", "BEGIN"),
])  # fmt: skip
def test_a_change_locks_before_it_reads_and_a_look_up_does_not(kind, statement, tmp_path):
    database, seen = Database.in_folder(tmp_path), []

    def run(connection):
        connection.connection.driver_connection.set_trace_callback(seen.append)
        connection.exec_driver_sql("SELECT 1")

    for _ in range(2):
        getattr(database, kind)(run)
    assert statement in seen
    database.close()


def test_a_restart_migrates_nothing_and_needs_no_alembic(open_kept):
    open_kept()
    sys.modules.pop("alembic.command", None)
    open_kept()
    assert "alembic.command" not in sys.modules


def test_tables_of_a_later_version_are_refused(open_kept):
    registry = open_kept()
    registry._database.write_now(
        lambda c: c.execute(text("UPDATE alembic_version SET version_num='9'"))
    )
    with pytest.raises(
        FailedPreconditionError, match=r"later version of redmux \(9, .*upgrade this"
    ):
        open_kept()


def test_a_database_of_something_else_is_refused(tmp_path):
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as database:
        database.execute("CREATE TABLE adapters (x)")
    with pytest.raises(FailedPreconditionError, match="adapters is not the registry's"):
        Database.in_folder(tmp_path)


@pytest.mark.parametrize("kind", ["empty", "no database", "cut", "wal alone", "folder"])
def test_a_registry_that_cannot_be_opened_never_starts_empty(kind, tmp_path, open_registry, files):
    registry = open_registry(tmp_path)
    asyncio.run(registry.put("x", files[0], "", replace=False))
    asyncio.run(registry.close())
    path = tmp_path / FILE_NAME
    data = path.read_bytes()
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "wal alone":
        path.with_name(f"{FILE_NAME}-wal").write_bytes(b"something")
    else:
        path.write_bytes({"empty": b"", "no database": b"x" * 9999, "cut": data[:5000]}[kind])
    for _ in range(2):
        with pytest.raises(FailedPreconditionError, match=str(path)):
            Database.in_folder(tmp_path)


def test_a_kill_while_a_registry_is_made_leaves_none(tmp_path):
    (tmp_path / f".{FILE_NAME}.tmp").write_bytes(b"half of it")
    Database.in_folder(tmp_path).close()
    assert not (tmp_path / f".{FILE_NAME}.tmp").exists()


@pytest.mark.parametrize("url", ["nonsense", "mysql://x/y", "sqlite:///x.db", "postgresql://host"])
def test_a_url_of_another_kind_is_refused_with_what_it_has_to_be(url):
    with pytest.raises(InvalidArgumentError, match="postgresql\\+psycopg://user:password@host"):
        Database.at(url)


def test_a_database_that_is_not_there_is_told_without_its_password(tmp_path):
    url = f"postgresql+psycopg://test:secret@/none?host={tmp_path}"
    with pytest.raises(FailedPreconditionError, match="does not answer") as found:
        Database.at(url)
    assert "secret" not in str(found.value)
