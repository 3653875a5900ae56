"""Inserts that skip or replace existing rows, so that several processes can write one table at once."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from sqlalchemy.orm import Session

from db.store.tables import Base

if TYPE_CHECKING:
    from sqlalchemy.dialects.sqlite import Insert


def insert_if_new(
    session: Session, table: type[Base], rows: Sequence[dict[str, Any]], *, unique: Sequence[str]
) -> None:
    """Insert the rows whose `unique` columns are not there yet; leave the others as they are."""
    statement = _insert(session, table).on_conflict_do_nothing(index_elements=unique)
    session.connection().execute(statement, rows)


def insert_or_replace(
    session: Session, table: type[Base], rows: Sequence[dict[str, Any]], *, unique: Sequence[str], newest_by: str
) -> None:
    """Insert the rows, replacing the row that has the same `unique` columns unless that one is newer by `newest_by`.

    Rows are written in the order given: writers that sort alike cannot deadlock.
    """
    if not rows:
        return
    statement = _insert(session, table)
    changed = {name: statement.excluded[name] for name in rows[0] if name not in unique}
    current = table.__table__.c[newest_by]
    statement = statement.on_conflict_do_update(
        index_elements=unique, set_=changed, where=statement.excluded[newest_by] >= current
    )
    session.connection().execute(statement, rows)


def _insert(session: Session, table: type[Base]) -> Insert:
    """By SQLite or PostgreSQL, whose inserts are alike; the other one's dialect need not be imported."""
    dialect = import_module(f"sqlalchemy.dialects.{session.get_bind().dialect.name}")
    insert: Insert = dialect.insert(table)
    return insert
