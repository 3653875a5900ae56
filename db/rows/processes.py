"""Long-running commands that use the database, and detection of those that died."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import select, update

from db.store.engine import Database
from db.store.leases import hold_lease, is_held
from db.store.provenance import code_version, now
from db.store.tables import ProcessRow, RunStatus

__all__ = ["StoredProcess", "is_running", "list_processes", "process_row"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredProcess:
    """One command that uses, or used, the database."""

    id: int
    command: str
    host: str
    pid: int
    status: RunStatus
    started_at: datetime
    finished_at: datetime | None
    error: str | None
    code_version: str


@contextmanager
def process_row(database: Database, command: str) -> Iterator[int]:
    """Record that this process runs `command` for the duration of the block -> the row's id.

    The process holds a lease meanwhile: when it dies, whoever opens the database next marks the row, and the runs that
    belong to it, as lost.
    """
    with database.session() as session:
        row = ProcessRow(
            command=command,
            host=socket.gethostname(),
            pid=os.getpid(),
            status=RunStatus.FAILED,  # until the lease is held: a running row without one would be lost
            started_at=now(),
            error="it never began",
            code_version=code_version(),
        )
        session.add(row)
        session.flush()
        process_id = row.id
    with hold_lease(database.engine, database.url, process_id):
        _set_status(database, process_id, RunStatus.RUNNING, None)
        try:
            yield process_id
        except BaseException as error:
            _set_status(database, process_id, RunStatus.FAILED, f"{type(error).__name__}: {error}".removesuffix(": "))
            raise
        _set_status(database, process_id, RunStatus.DONE, None)


def is_running(database: Database, process_id: int) -> bool:
    """Whether the process of an id is marked as running and holds its lease."""
    with database.reading() as session:
        row = session.get(ProcessRow, process_id)
    return row is not None and row.status is RunStatus.RUNNING and is_held(database.engine, database.url, process_id)


def list_processes(database: Database, *, limit: int | None = None) -> list[StoredProcess]:
    """Processes, newest first."""
    with database.reading() as session:
        rows = session.scalars(select(ProcessRow).order_by(ProcessRow.id.desc()).limit(limit)).all()
    return [StoredProcess(**{name: getattr(row, name) for name in StoredProcess.__dataclass_fields__}) for row in rows]


def _set_status(database: Database, process_id: int, status: RunStatus, error: str | None) -> None:
    finished_at = None if status is RunStatus.RUNNING else now()
    with database.session() as session:
        row = update(ProcessRow).where(ProcessRow.id == process_id)
        session.execute(row.values(status=status, error=error, finished_at=finished_at))
