"""The revision of a database's tables, and its upgrade to the current one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Connection, Engine, inspect, text

from db.errors import UserError
from db.store.tables import Base

VERSION_TABLE = "isochunk_schema"
REVISIONS = (
    "0001",
    "0002",
    "0003",
    "0004",
    "0005",
    "0006",
)  # oldest first; known here so that opening a current database need not import alembic
HEAD = REVISIONS[-1]
MIGRATIONS = Path(__file__).parent / "migrations"
_ADVISORY_LOCK = 0x69736F63  # "isoc": PostgreSQL's name for the lock that upgrades take


def stored_revision(connection: Connection, location: str | None = None) -> str | None:
    """The revision the database has; None when it has no tables of ours.

    location: where it is, as a user may read it; None is the connection's URL.
    Raises UserError when the tables are another program's or of a newer version than this code.
    """
    location = location or connection.engine.url.render_as_string(hide_password=True)
    tables = set(inspect(connection).get_table_names())
    if VERSION_TABLE not in tables:
        ours = set(Base.metadata.tables)
        foreign = tables if connection.dialect.name == "sqlite" else tables & ours
        if foreign:
            found = ", ".join(sorted(foreign)[:3])
            raise UserError("database", location, f"belongs to another program (its tables: {found})")
        return None
    revision = connection.scalar(text(f"SELECT version_num FROM {VERSION_TABLE}"))
    if revision is not None and revision not in REVISIONS:
        allowed = f"has schema {revision} of a newer version; this version reads up to {HEAD}: update isochunk"
        raise UserError("database", location, allowed)
    return None if revision is None else str(revision)


def upgrade(engine: Engine, lock_timeout_s: float) -> None:
    """Bring the tables to HEAD, whole or not at all; of several processes one does it and the others wait."""
    with _exclusive(engine, lock_timeout_s) as connection:
        if stored_revision(connection) == HEAD:  # another process was first
            return
        from alembic import command
        from alembic.config import Config

        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


@contextmanager
def _exclusive(engine: Engine, lock_timeout_s: float) -> Iterator[Connection]:
    if engine.dialect.name != "sqlite":
        with engine.begin() as connection:
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})
            yield connection
        return
    with engine.execution_options(sqlite_begin="BEGIN IMMEDIATE").connect() as connection:
        _pragma(connection, "foreign_keys=OFF")  # a table rebuilt with it on would delete the rows that point to it
        _write_ahead(connection, lock_timeout_s)
        try:
            with connection.begin():
                yield connection
                broken = connection.exec_driver_sql("PRAGMA foreign_key_check").fetchall()
                assert not broken, f"the upgrade broke references: {broken[:3]}"
        finally:
            _pragma(connection, "foreign_keys=ON")


def _write_ahead(connection: Connection, lock_timeout_s: float) -> None:
    """Switch to WAL, so that readers and the one writer do not wait for each other. The file remembers it."""
    from sqlite3 import OperationalError

    deadline = time.monotonic() + lock_timeout_s
    while True:
        try:
            return _pragma(connection, "journal_mode=WAL")
        except OperationalError as error:  # SQLite does not wait here by itself
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _pragma(connection: Connection, setting: str) -> None:
    """Set it outside any transaction: inside one SQLite ignores it."""
    cursor = connection.connection.cursor()
    cursor.execute(f"PRAGMA {setting}")
    cursor.close()
