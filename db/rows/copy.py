"""Copies all rows of a database into an empty one: to move to another engine, or as a backup."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, Table, func, insert, select, text

from db.errors import UserError
from db.store.engine import Database
from db.store.failures import translated
from db.store.provenance import now
from db.store.tables import Base, RunStatus

_ROWS_AT_ONCE = 5_000
_LEFT = {"status": RunStatus.LOST, "error": "it was at work when the database was copied"}


def copy_database(source: Database, target: Database, progress: Callable[[str, int], None]) -> dict[str, int]:
    """Copy all rows, all or none -> how many of each table.

    The source is read as it is at one moment, and may be written meanwhile. Running commands and runs count as lost in
    the copy. progress: called now and then with a table's name and how many of its rows are copied.

    Raises UserError for a target that holds rows already, and for one that is the source.
    """
    if source.url == target.url:
        raise UserError("TO", target.location, "must be another database than FROM")
    counts: dict[str, int] = {}
    reading = source.engine
    if reading.dialect.name == "postgresql":
        reading = reading.execution_options(isolation_level="REPEATABLE READ")
    writing = target.engine.execution_options(sqlite_begin="BEGIN IMMEDIATE")
    with (
        translated(source.location, source.lock_timeout_s),
        reading.connect() as old,
        old.begin(),
        translated(target.location, target.lock_timeout_s),
        writing.begin() as new,
    ):
        for table in Base.metadata.sorted_tables:
            if new.scalar(select(func.count()).select_from(select(table).limit(1).subquery())):
                raise UserError("TO", target.location, f"must be an empty database: it has rows in {table.name}")
        for table in Base.metadata.sorted_tables:
            counts[table.name] = _copy_table(old, new, table, progress)
    return counts


def _copy_table(old: Connection, new: Connection, table: Table, progress: Callable[[str, int], None]) -> int:
    keys = list(table.primary_key.columns)
    found = old.execution_options(yield_per=_ROWS_AT_ONCE).execute(select(table).order_by(*keys))
    count = 0
    for batch in found.mappings().partitions(_ROWS_AT_ONCE):
        new.execute(insert(table), [_as_kept(dict(row)) for row in batch])
        count += len(batch)
        progress(table.name, count)
    if new.dialect.name == "postgresql" and count and table.autoincrement_column is not None:
        # Ids were given, not drawn: the next one drawn must come after them.
        name = f"pg_get_serial_sequence('{table.name}', 'id')"
        new.execute(text(f"SELECT setval({name}, (SELECT max(id) FROM {table.name})) WHERE {name} IS NOT NULL"))
    return count


def _as_kept(row: dict[str, Any]) -> dict[str, Any]:
    if row.get("status") is RunStatus.RUNNING:
        row |= _LEFT | {"finished_at": now()}
    return row
