"""Integrity checks of a database: a quick one when it is opened, a full one on request."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import Connection

from db.errors import UserError

QUICK_BYTES = 16 << 20
"""A SQLite file up to this size is looked through whenever it is opened: some 60 ms at the most."""
WHAT_TO_DO = "restore a copy, or save what can be read: sqlite3 damaged.db .recover | sqlite3 saved.db"


def check_quickly(connection: Connection, path: Path, location: str) -> None:
    """Raise UserError for a SQLite file with damaged pages.

    A large file is looked through only after an unclean end, which leaves the journal of a process that did not close
    the database (or the journal of one that has it open now).
    """
    journal = path.with_name(f"{path.name}-wal")
    unclean = journal.exists() and journal.stat().st_size > 0
    if unclean or path.stat().st_size <= QUICK_BYTES:
        _refuse(location, _said(connection, "PRAGMA quick_check(1)"))


def check_fully(connection: Connection, location: str) -> None:
    """Raise UserError unless every page, index and reference of a SQLite database is whole; a server checks its own."""
    if connection.dialect.name == "sqlite":
        _refuse(location, _said(connection, "PRAGMA integrity_check(1)"))
        broken = connection.exec_driver_sql("PRAGMA foreign_key_check").first()
        if broken is not None:
            raise UserError("database", location, f"damaged (a row of {broken[0]} belongs to nothing); {WHAT_TO_DO}")


def _said(connection: Connection, pragma: str) -> str:
    return str(connection.exec_driver_sql(pragma).scalar())


def _refuse(location: str, said: str) -> None:
    if said != "ok":
        raise UserError("database", location, f"damaged ({' '.join(said.split())}); {WHAT_TO_DO}")
