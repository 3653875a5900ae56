"""Workers: processes that take jobs, and the hardware of each."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import datetime

from sqlalchemy import insert, select

from db.store.engine import Database, lost_processes
from db.store.tables import ProcessRow, RunStatus, WorkerRow

__all__ = ["StoredWorker", "WorkerHardware", "list_workers", "lost_processes", "save_worker"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerHardware:
    """The hardware that a worker reports."""

    machine: str
    """Its name: one worker a machine."""
    device_type: str
    device: str
    device_count: int
    memory_bytes: int  # of one device

    @property
    def key(self) -> str:
        """Equal for hardware that the same jobs may run on."""
        return f"{self.device} x{self.device_count}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredWorker:
    """A stored worker, running or not."""

    id: int
    """Of its process."""
    hardware: WorkerHardware
    alive: bool
    started_at: datetime


def save_worker(database: Database, process_id: int, hardware: WorkerHardware) -> None:
    """Store the hardware of a process's worker."""
    with database.session() as session:
        session.execute(insert(WorkerRow).values(process_id=process_id, **asdict(hardware)))


def list_workers(database: Database, *, alive: bool | None = None) -> list[StoredWorker]:
    """Workers, newest first; only running ones, or only ended ones, if that is given."""
    lost = set(lost_processes(database))
    query = (
        select(WorkerRow, ProcessRow)
        .join(ProcessRow, ProcessRow.id == WorkerRow.process_id)
        .order_by(ProcessRow.id.desc())
    )
    with database.reading() as session:
        found = [
            StoredWorker(
                id=process.id,
                hardware=WorkerHardware(
                    machine=row.machine,
                    device_type=row.device_type,
                    device=row.device,
                    device_count=row.device_count,
                    memory_bytes=row.memory_bytes,
                ),
                alive=process.status is RunStatus.RUNNING and process.id not in lost,
                started_at=process.started_at,
            )
            for row, process in session.execute(query)
        ]
    return [worker for worker in found if alive in (None, worker.alive)]
