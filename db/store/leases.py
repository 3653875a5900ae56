"""Leases that end with the process that holds them, and that other processes can query.

On PostgreSQL an advisory lock of a connection, beside a SQLite file a lock on one byte of a second file. A database in
memory has no other process, and so no leases; nor has SQLite where the system lacks locks of open files (Linux has
them).
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import URL, Engine, text

from db.store.location import sqlite_path

_ADVISORY_CLASS = 0x69736F70  # "isop": PostgreSQL's first key of our leases; the second is the number
_FLOCK = "hhqqi"  # struct flock: type, whence, start, length, pid
_HELD = text(
    "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 2 AND granted"
    " AND classid = :class AND objid = :number"
    " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
)


@contextmanager
def hold_lease(engine: Engine, url: URL, number: int) -> Iterator[None]:
    """Hold the lease of a number for the length of the block."""
    path = _file(url)
    if engine.dialect.name == "postgresql":
        keys = _keys(number)
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("SELECT pg_advisory_lock(:class, :number)"), keys)
            try:
                yield
            finally:
                connection.invalidate()  # closes it: the lock goes with it, even after an error
    elif path is not None:
        with path.open("ab") as file:
            fcntl.fcntl(file, fcntl.F_OFD_SETLK, _byte(fcntl.F_WRLCK, number))
            yield
    else:
        yield


def is_held(engine: Engine, url: URL, number: int) -> bool:
    """Whether some process holds the lease of a number; True where there are no leases."""
    path = _file(url)
    if engine.dialect.name == "postgresql":
        with engine.connect() as connection:
            return bool(connection.scalar(_HELD, _keys(number)))
    if path is None:
        return True
    if not path.exists():
        return False
    with path.open("rb") as file:
        answer = fcntl.fcntl(file, fcntl.F_OFD_GETLK, _byte(fcntl.F_WRLCK, number))
    return bool(struct.unpack_from(_FLOCK, answer)[0] != fcntl.F_UNLCK)


def _file(url: URL) -> Path | None:
    path = sqlite_path(url) if hasattr(fcntl, "F_OFD_SETLK") else None
    return None if path is None else path.with_name(f"{path.name}-leases")


def _byte(kind: int, number: int) -> bytes:
    return struct.pack(_FLOCK, kind, os.SEEK_SET, number, 1, 0)


def _keys(number: int) -> dict[str, int]:
    return {"class": _ADVISORY_CLASS, "number": number}
