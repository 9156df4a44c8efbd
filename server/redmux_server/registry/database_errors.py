"""What a database refuses, as errors of the tree."""

import contextlib
import logging
import sqlite3
from collections.abc import Iterator

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from redmux.errors import (
    DataLossError,
    FailedPreconditionError,
    RedmuxError,
    ResourceExhaustedError,
    UnavailableError,
)

logger = logging.getLogger(__name__)

_FULL = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_TOOBIG)
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
_REFUSED = (
    sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_AUTH,
)  # fmt: skip
# Classes of PostgreSQL's SQLSTATE; it has none where the server was not reached.
_NO_ROOM = ("53100", "53200")
_READ_ONLY = ("25006", "42501", "28", "3D")
_DAMAGE = ("XX001", "XX002")
_AWAY = ("08", "53", "57", "55P03", "40")


@contextlib.contextmanager
def told(consequence: str, if_away: str = "its database does not answer") -> Iterator[None]:
    """Turns what the database refuses into an error of the tree that begins with `consequence`.

    `if_away` is what to say where the database is not reached, or not any more.
    The log has what the database said; callers learn no more than what they can do. What is a fault
    of ours is raised as it is.
    """
    try:
        yield
    except PoolTimeout:
        raise UnavailableError(f"{consequence}: it is busy; try again") from None
    except DBAPIError as err:
        error = _error(err, consequence, if_away)
        if error is None:
            raise
        logger.error("%s: %s", consequence, str(err.orig).strip())
        raise error from None


def _error(err: DBAPIError, consequence: str, if_away: str) -> RedmuxError | None:
    if isinstance(err.orig, sqlite3.Error):
        return _of_sqlite(getattr(err.orig, "sqlite_errorcode", 0) & 0xFF, err, consequence)
    state = getattr(err.orig, "sqlstate", None)
    if state is None or err.connection_invalidated or state.startswith(_AWAY):
        if state in _NO_ROOM:
            return _full(consequence)
        return UnavailableError(f"{consequence}: {if_away}; try again")
    if state.startswith(_READ_ONLY):
        return FailedPreconditionError(f"{consequence}: {_first_line(err)}")
    if state in _DAMAGE:
        return DataLossError(f"{consequence}: {_first_line(err)}")
    return None


def _of_sqlite(code: int, err: DBAPIError, consequence: str) -> RedmuxError | None:
    if code in _FULL:
        return _full(consequence)
    if code in _DAMAGED:
        return DataLossError(f"{consequence}: {_first_line(err)}")
    if code in _BUSY:
        return UnavailableError(f"{consequence}: it is busy; try again")
    if code in _REFUSED:
        return FailedPreconditionError(
            f"{consequence}: {_first_line(err)}; its operator has to mend that"
        )
    return None


def _full(consequence: str) -> RedmuxError:
    return ResourceExhaustedError(
        f"{consequence}: there is no room left (disk full); delete adapters, or have its operator "
        "make room"
    )


def _first_line(err: DBAPIError) -> str:
    return str(err.orig).strip().partition("\n")[0]
