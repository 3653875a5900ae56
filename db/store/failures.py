"""Turns what a database driver raises into one line a user can act on."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.exc import DBAPIError

from db.errors import UserError
from db.store.integrity import WHAT_TO_DO
from db.store.location import parse_url, sqlite_path

NEEDED_BYTES = 8 << 20  # the journal grows to 4 MiB before it is folded into the file
NEEDED = f"some {NEEDED_BYTES >> 20} MiB must be free"
# By the start of SQLite's result code (https://sqlite.org/rescode.html), which its extended codes continue.
_SQLITE = {
    "SQLITE_BUSY": "locked by another process for {waited_s:g} s; must be free for writing",
    "SQLITE_LOCKED": "locked by another process for {waited_s:g} s; must be free for writing",
    "SQLITE_READONLY": "read-only; must be writable, its folder too",
    "SQLITE_FULL": "no space left on its disk; nothing was written ({needed})",
    "SQLITE_IOERR": "its disk fails to read or write ({message}); nothing was written",
    "SQLITE_NOTADB": "not a database; must be a SQLite file",
    "SQLITE_CORRUPT": f"damaged ({{message}}); {WHAT_TO_DO}",
    "SQLITE_CANTOPEN": "cannot be opened; must be a SQLite file in a folder that can be read and written",
}
# By SQLSTATE or its class (https://www.postgresql.org/docs/current/errcodes-appendix.html).
_POSTGRESQL = {
    "55P03": "locked by another process for {waited_s:g} s; must be free for writing",
    "53": "the server is out of resources ({message}); nothing was written",
    "25006": "read-only; must be writable",
    "42501": "no permission ({message}); its user must be able to read and write",
    "28": "login refused ({message}); must be a user and password the server knows",
    "3D000": "no such database ({message}); must exist on the server",
    "57P": "the server stopped ({message}); must be running",
    "08": "the server is unreachable ({message}); must be running",
}
_UNREACHABLE = "the server is unreachable ({message}); must be a running PostgreSQL server and an existing database"


@contextmanager
def translated(location: str, waited_s: float) -> Iterator[None]:
    """Raise UserError where the database at `location` is at fault; any other error passes through.

    waited_s: seconds that a lock is waited for, to be named.
    """
    try:
        yield
    except (DBAPIError, sqlite3.Error) as error:
        cause = error.orig if isinstance(error, DBAPIError) else error
        allowed = _SQLITE["SQLITE_FULL"] if _is_full(cause, location) else _what_is_allowed(cause)
        if allowed is None:
            raise
        message = " ".join(str(cause).split("\n")[0].split())
        explained = allowed.format(waited_s=waited_s, message=message, needed=NEEDED)
        raise UserError("database", location, explained) from error


def _what_is_allowed(cause: BaseException | None) -> str | None:
    if isinstance(cause, sqlite3.Error):
        return _longest_prefix(_SQLITE, getattr(cause, "sqlite_errorname", ""))
    sqlstate = getattr(cause, "sqlstate", None)
    if sqlstate is None:  # libpq gives a failed connection no code
        return _UNREACHABLE if type(cause).__name__ in {"OperationalError", "ConnectionTimeout"} else None
    return _longest_prefix(_POSTGRESQL, sqlstate)


def _is_full(cause: BaseException | None, location: str) -> bool:
    """Whether a disk that fails is one that is full: SQLite says so only of some of its files."""
    if not getattr(cause, "sqlite_errorname", "").startswith(("SQLITE_IOERR", "SQLITE_CANTOPEN")):
        return False
    path = sqlite_path(parse_url(location))
    try:
        return path is not None and shutil.disk_usage(path.parent).free < NEEDED_BYTES
    except OSError:
        return False


def _longest_prefix(table: dict[str, str], code: str) -> str | None:
    matches = [prefix for prefix in table if code.startswith(prefix)]
    return table[max(matches, key=len)] if matches else None
