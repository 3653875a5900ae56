"""Runs of plans: the measured times of each round on each stage, and the predicted ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import delete, insert, select, update
from sqlalchemy.orm import Session

from db.rows.hardware import Hardware, hardware_id, id_of
from db.store.engine import Database
from db.store.provenance import code_version, now
from db.store.tables import RoundTimeRow, RunKind, RunRow, RunStatus

__all__ = ["RoundTime", "RunKind", "RunOutcome", "RunStatus", "StoredRun", "delete_runs", "fail_run", "find_run",
           "finish_run", "list_runs", "load_round_times", "start_run"]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundTime:
    """When one round ran on one stage, in seconds from the start of the run.

    Where the plan's stages hold several groups of layers (`parallel.virtual_stages`), `stage` is the group.
    """

    round: int
    stage: int
    predicted_s: float | None = None  # how long it was predicted to take
    start_s: float
    finish_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOutcome:
    """The measurements of a finished run."""

    makespan_s: float
    predicted_makespan_s: float | None = None
    slowdown: float | None = None  # of the machine since its profile: 1.2 is a fifth slower
    mfu: float | None = None
    ttft_s: Sequence[float] = ()  # of each request, in the plan's order
    rounds: Sequence[RoundTime] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRun:
    """A stored run, with its outcome once it is done and its error if it failed."""

    id: int
    plan_id: int
    hardware_id: int
    process_id: int | None
    kind: RunKind
    status: RunStatus
    study: str | None
    details: dict[str, Any]
    started_at: datetime
    finished_at: datetime | None
    makespan_s: float | None
    predicted_makespan_s: float | None
    slowdown: float | None
    mfu: float | None
    ttft_s: list[float] | None
    error: str | None
    failed_rank: int | None
    failed_stage: int | None
    failed_round: int | None
    code_version: str


def start_run(
    database: Database,
    plan_id: int,
    hardware: Hardware,
    *,
    kind: RunKind | str = RunKind.RUN_PLAN,
    study: str | None = None,
    details: Mapping[str, Any] | None = None,
    process_id: int | None = None,
) -> int:
    """Record the start of a run of a plan and return its id.

    study: the name of the auto-tuning study or benchmark the run belongs to.
    process_id: of `db.rows.processes.process_row`; when that process dies, the run counts as lost.
    details: anything else worth keeping, as JSON.
    """
    with database.session() as session:
        row = RunRow(
            plan_id=plan_id,
            hardware_id=hardware_id(session, hardware),
            process_id=process_id,
            kind=RunKind(kind),
            status=RunStatus.RUNNING,
            study=study,
            details=dict(details or {}),
            started_at=now(),
            code_version=code_version(),
        )
        session.add(row)
        session.flush()
        return row.id


def finish_run(
    database: Database, run_id: int, outcome: RunOutcome, *, also: Callable[[Session], None] | None = None
) -> None:
    """Store the measurements of a run, its rounds included. Raises ValueError when the run is not running.

    also: writes more in the same transaction: all of it is kept, or nothing.
    """
    with database.session() as session:
        ended = _end_run(
            session,
            run_id,
            status=RunStatus.DONE,
            makespan_s=outcome.makespan_s,
            predicted_makespan_s=outcome.predicted_makespan_s,
            slowdown=outcome.slowdown,
            mfu=outcome.mfu,
            ttft_s=list(outcome.ttft_s),
        )
        if not ended:
            raise ValueError(f"run {run_id} is not running")
        if outcome.rounds:
            session.execute(insert(RoundTimeRow), [{"run_id": run_id} | asdict(time) for time in outcome.rounds])
        if also is not None:
            also(session)


def fail_run(
    database: Database,
    run_id: int,
    error: str,
    *,
    rank: int | None = None,
    stage: int | None = None,
    round_index: int | None = None,
) -> bool:
    """Record that the run failed, and where. False, and nothing changes, when the run had already ended."""
    with database.session() as session:
        return _end_run(
            session,
            run_id,
            status=RunStatus.FAILED,
            error=error,
            failed_rank=rank,
            failed_stage=stage,
            failed_round=round_index,
        )


def list_runs(
    database: Database,
    *,
    plan_id: int | None = None,
    kind: RunKind | str | None = None,
    study: str | None = None,
    status: RunStatus | str | None = None,
    hardware: Hardware | None = None,
    limit: int | None = None,
    before: int | None = None,
) -> list[StoredRun]:
    """Runs, newest first, only those that have each value given, or that began before the run of an id."""
    wanted = {
        "plan_id": plan_id,
        "kind": RunKind(kind) if kind else None,
        "study": study,
        "status": RunStatus(status) if status else None,
    }
    query = select(RunRow).filter_by(**{name: value for name, value in wanted.items() if value is not None})
    if hardware is not None:
        query = query.where(RunRow.hardware_id == id_of(hardware))
    if before is not None:
        query = query.where(RunRow.id < before)
    with database.reading() as session:
        rows = session.scalars(query.order_by(RunRow.id.desc()).limit(limit)).all()
    return [StoredRun(**{name: getattr(row, name) for name in StoredRun.__dataclass_fields__}) for row in rows]


def find_run(database: Database, run_id: int) -> StoredRun | None:
    """The run of an id, None when there is none."""
    with database.reading() as session:
        row = session.get(RunRow, run_id)
    if row is None:
        return None
    return StoredRun(**{name: getattr(row, name) for name in StoredRun.__dataclass_fields__})


def delete_runs(database: Database, run_ids: Sequence[int]) -> int:
    """Remove runs that have ended, with the times of their rounds; their plans stay. Returns how many there were."""
    with database.session() as session:
        ended = select(RunRow.id).where(RunRow.id.in_(run_ids), RunRow.status != RunStatus.RUNNING)
        found = session.scalars(ended).all()
        session.execute(delete(RoundTimeRow).where(RoundTimeRow.run_id.in_(found)))
        session.execute(delete(RunRow).where(RunRow.id.in_(found)))
    return len(found)


def load_round_times(database: Database, run_id: int) -> list[RoundTime]:
    """The times of a run's rounds, by round and stage."""
    query = select(RoundTimeRow).where(RoundTimeRow.run_id == run_id).order_by(RoundTimeRow.round, RoundTimeRow.stage)
    with database.reading() as session:
        rows = session.scalars(query).all()
    return [RoundTime(**{name: getattr(row, name) for name in RoundTime.__dataclass_fields__}) for row in rows]


def _end_run(session: Session, run_id: int, **values: object) -> bool:
    # A run that was taken for lost, because the database's server was away for a while, may yet end well.
    running = (RunRow.id == run_id, RunRow.status.in_([RunStatus.RUNNING, RunStatus.LOST]))
    ended = session.execute(
        update(RunRow).where(*running).values(finished_at=now(), **values).returning(RunRow.id),
        execution_options={"synchronize_session": False},
    )
    return ended.first() is not None
