"""Opens the database and hands out sessions that commit whole or not at all."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import URL, Connection, Engine, NullPool, StaticPool, create_engine, event, select, update
from sqlalchemy.exc import DBAPIError, NoSuchModuleError
from sqlalchemy.orm import Session

from db.errors import UserError, cut
from db.store.failures import translated
from db.store.integrity import WHAT_TO_DO, check_fully, check_quickly
from db.store.leases import is_held
from db.store.location import check_file, default_url, parse_url, read_only_url, shown, sqlite_path
from db.store.provenance import now
from db.store.schema import HEAD, stored_revision, upgrade
from db.store.tables import Base, ProcessRow, RunRow, RunStatus

__all__ = ["Database", "default_url", "open_database"]

TIMEOUT_VARIABLE = "ISOCHUNK_DB_TIMEOUT_S"
_DEFAULT_TIMEOUT_S = 30.0
_CONNECT_TIMEOUT_S = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Database:
    """An open database whose tables are those of this version."""

    engine: Engine
    url: URL
    location: str  # the URL without its password
    read_only: bool
    lock_timeout_s: float
    found_revision: str | None  # of the tables when it was opened; None when there were none

    @contextmanager
    def session(self) -> Iterator[Session]:
        """A transaction that may write: committed at the end of the block, rolled back whole if anything raises.

        Raises UserError when the database is read-only, full, gone or locked for longer than `lock_timeout_s`.
        """
        if self.read_only:
            raise UserError("database", self.location, "opened read-only; must be writable")
        # SQLite: taking the write lock at once waits for it; taking it after a first read fails at once instead.
        with self._begin(self.engine.execution_options(sqlite_begin="BEGIN IMMEDIATE")) as session:
            yield session

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A transaction that only reads: on SQLite it neither waits for a writer nor holds one up."""
        try:
            with self._begin(self.engine) as session:
                yield session
        except UserError:
            raise
        except (ValueError, LookupError, TypeError, ArithmeticError, DBAPIError) as error:
            # What was written was checked, so that a row which cannot be read was damaged since.
            reason = cut(getattr(error, "orig", None) or error)
            raise UserError("database", self.location, f"a row cannot be read ({reason}); {WHAT_TO_DO}") from error

    @contextmanager
    def _begin(self, engine: Engine) -> Iterator[Session]:
        with (
            translated(self.location, self.lock_timeout_s),
            Session(engine, expire_on_commit=False) as session,
            session.begin(),
        ):
            yield session

    def check(self) -> None:
        """Raise UserError unless the database is whole: every page, every index, every reference, every row."""
        with translated(self.location, self.lock_timeout_s), self.engine.connect() as connection:
            check_fully(connection, self.location)
        with self.reading() as session:
            for table in Base.metadata.sorted_tables:
                for _ in session.execute(select(table).execution_options(yield_per=1000)):
                    pass

    def close(self) -> None:
        """Close the connections that are held."""
        self.engine.dispose()

    def __enter__(self) -> Database:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


def open_database(url: str | None = None, *, read_only: bool = False, lock_timeout_s: float | None = None) -> Database:
    """Open the database at a SQLAlchemy URL, creating it or bringing its tables to this version first.

    url: SQLite or PostgreSQL; None is `ISOCHUNK_DB` or the default file.
    read_only: nothing is created, upgraded or written.
    lock_timeout_s: how long to wait for another process's lock; None is `ISOCHUNK_DB_TIMEOUT_S` or 30.

    Raises UserError for a database that is of a newer version, read-only, locked for too long, damaged, another
    program's or not a database, for a missing folder, an unknown kind of URL and an unreachable server.
    """
    parsed = parse_url(url or default_url())
    timeout_s = _lock_timeout_s() if lock_timeout_s is None else lock_timeout_s
    path = sqlite_path(parsed)
    if path is not None:
        check_file(path, read_only=read_only)
    engine = _make_engine(read_only_url(parsed, path) if path is not None and read_only else parsed, timeout_s)
    location = shown(parsed)
    try:
        with translated(location, timeout_s):
            with engine.connect() as connection:
                revision = stored_revision(connection, location)
                if path is not None and path.exists() and revision is not None:
                    check_quickly(connection, path, location)
            if revision != HEAD:
                if read_only:
                    allowed = f"has schema {revision}, this version reads {HEAD}; run `isochunk db upgrade`"
                    raise UserError("database", location, allowed)
                upgrade(engine, timeout_s)
    except BaseException:
        engine.dispose()
        raise
    database = Database(
        engine=engine,
        url=parsed,
        location=location,
        read_only=read_only,
        lock_timeout_s=timeout_s,
        found_revision=revision,
    )
    if not read_only:
        _mark_lost(database)
    return database


def lost_processes(database: Database) -> list[int]:
    """Ids of processes that are said to run and whose lease nobody holds."""
    with database.reading() as session:
        running = session.scalars(select(ProcessRow.id).where(ProcessRow.status == RunStatus.RUNNING)).all()
    return [number for number in running if not is_held(database.engine, database.url, number)]


def _mark_lost(database: Database) -> None:
    """Mark processes that are gone, and their runs, as lost."""
    lost = lost_processes(database)
    if lost:
        ended = {"status": RunStatus.LOST, "finished_at": now(), "error": "its process ended without a word"}
        with database.session() as session:
            for row, owner in ((ProcessRow, ProcessRow.id), (RunRow, RunRow.process_id)):
                session.execute(update(row).where(owner.in_(lost), row.status == RunStatus.RUNNING).values(**ended))


def _lock_timeout_s() -> float:
    text = os.environ.get(TIMEOUT_VARIABLE, "")
    try:
        seconds = float(text) if text else _DEFAULT_TIMEOUT_S
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise UserError(TIMEOUT_VARIABLE, text, "must be a number of seconds, 0 or more")
    return seconds


def _make_engine(url: URL, timeout_s: float) -> Engine:
    if url.get_backend_name() == "sqlite":
        in_memory = not url.database or url.database == ":memory:"
        # No pool for files: a connection must not be carried across a fork, and opening one takes some 0.1 ms.
        pool = StaticPool if in_memory else NullPool
        engine = create_engine(url, poolclass=pool, connect_args={"timeout": timeout_s}, json_serializer=_json)
        event.listen(engine, "connect", _set_up_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine
    try:
        connect_args = {"connect_timeout": _CONNECT_TIMEOUT_S}
        engine = create_engine(url, pool_pre_ping=True, connect_args=connect_args, json_serializer=_json)
    except (ModuleNotFoundError, NoSuchModuleError):
        raise UserError(
            "database", shown(url), "PostgreSQL needs psycopg: pip install 'isochunk[postgresql]'"
        ) from None

    def set_up_postgresql(connection: Any, _record: object) -> None:
        with connection.cursor() as cursor:
            cursor.execute(f"SET lock_timeout = {max(1, round(timeout_s * 1000))}")  # 0 would wait for ever
        connection.commit()

    event.listen(engine, "connect", set_up_postgresql)
    return engine


def _set_up_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None  # we say BEGIN ourselves: Python's driver leaves DDL out of transactions
    connection.execute("PRAGMA foreign_keys=ON")


def _begin_sqlite(connection: Connection) -> None:
    connection.exec_driver_sql(connection.get_execution_options().get("sqlite_begin", "BEGIN"))


def _json(value: object) -> str:
    import json

    return json.dumps(value, allow_nan=False, separators=(",", ":"))  # NaN is no JSON: PostgreSQL refuses it
