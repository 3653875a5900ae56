"""How jobs of the service ended: one row a job, written once, where possible in the transaction of the job's own rows.

The process that runs a job's command has the job's id in the variable `ISOCHUNK_JOB`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import insert
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from db.errors import UserError
from db.store.engine import Database
from db.store.provenance import code_version, now
from db.store.tables import JobEndRow

VARIABLE = "ISOCHUNK_JOB"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOutcome:
    """How a job's command ended."""

    exit_code: int
    error: str | None = None
    """The last line that it said, where it failed."""
    result: Any = None
    """What it printed as JSON."""

    def to_json(self) -> dict[str, Any]:
        """As it is kept."""
        return asdict(self)


def add_end(session: Session, job: str, outcome: JobOutcome) -> None:
    """Write the end of a job in a transaction. Raises UserError for a job that has ended, and so undoes the rest of it.

    Another transaction that writes the same end is waited for: of several one is kept.
    """
    error = None if outcome.error is None else outcome.error.replace("\0", "")  # PostgreSQL takes none
    values = {"exit_code": outcome.exit_code, "error": error, "result": outcome.result}
    try:
        session.execute(insert(JobEndRow).values(job=job, ended_at=now(), code_version=code_version(), **values))
    except IntegrityError:
        raise UserError("job", job, "has ended already: what a second run of it leaves is not kept") from None


def keep_end(database: Database, job: str, outcome: JobOutcome) -> JobOutcome:
    """Write the end of a job unless it has one -> the one that it has."""
    try:
        with database.session() as session:
            add_end(session, job, outcome)
    except UserError as error:
        if error.field != "job":
            raise
    kept = find_end(database, job)
    assert kept is not None
    return kept


def find_end(database: Database, job: str) -> JobOutcome | None:
    """The end of a job, None where it has not ended."""
    with database.reading() as session:
        row = session.get(JobEndRow, job)
    return None if row is None else JobOutcome(exit_code=row.exit_code, error=row.error, result=row.result)
