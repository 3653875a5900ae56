"""Plan files, each stored once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import func, select

from db.errors import UserError
from db.rows.hardware import Hardware, id_of
from db.store.engine import Database
from db.store.provenance import code_version, now
from db.store.tables import PlanRow, RunRow
from db.store.upsert import insert_if_new


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPlan:
    """A row of the list: one plan file and how often it was run."""

    id: int
    plan: dict[str, Any]
    hardware_id: int | None
    created_at: datetime
    code_version: str
    num_runs: int


def save_plan_row(database: Database, plan: Mapping[str, Any], *, hardware_id: int | None = None) -> int:
    """Keep a plan file's JSON and return its id; the same content again gives the same id.

    Raises ValueError if it holds NaN or infinity, which JSON cannot.
    """
    text = json.dumps(plan, sort_keys=True, separators=(",", ":"), allow_nan=False)
    content_hash = hashlib.sha256(text.encode()).hexdigest()
    row = {
        "content_hash": content_hash,
        "plan": dict(plan),
        "hardware_id": hardware_id,
        "created_at": now(),
        "code_version": code_version(),
    }
    with database.session() as session:
        insert_if_new(session, PlanRow, [row], unique=["content_hash"])
        return session.scalars(select(PlanRow.id).where(PlanRow.content_hash == content_hash)).one()


def get_plan_row(database: Database, plan_id: int) -> dict[str, Any]:
    """A plan file's JSON. Raises UserError when there is no such plan."""
    plan = find_plan(database, plan_id)
    if plan is None:
        raise UserError("plan", plan_id, "must be the id of a plan in the database (`isochunk db list plans`)")
    return plan


def find_plan(database: Database, plan_id: int) -> dict[str, Any] | None:
    """A plan file's JSON, None when there is no such plan."""
    with database.reading() as session:
        row = session.get(PlanRow, plan_id)
    return None if row is None else row.plan


def plan_hardware(database: Database, plan_id: int) -> int | None:
    """The id of the hardware that a plan was made for, if it says so. Raises UserError for an unknown plan."""
    with database.reading() as session:
        row = session.get(PlanRow, plan_id)
    if row is None:
        raise UserError("plan", plan_id, "must be the id of a plan in the database (`isochunk db list plans`)")
    return row.hardware_id


def list_plan_rows(
    database: Database, *, hardware: Hardware | None = None, limit: int | None = None, before: int | None = None
) -> list[StoredPlan]:
    """Plans, newest first, only those made for a hardware, or kept before the plan of an id, if that is given."""
    query = (
        select(PlanRow, func.count(RunRow.id))
        .outerjoin(RunRow, RunRow.plan_id == PlanRow.id)
        .group_by(PlanRow.id)
        .order_by(PlanRow.id.desc())
        .limit(limit)
    )
    if hardware is not None:
        query = query.where(PlanRow.hardware_id == id_of(hardware))
    if before is not None:
        query = query.where(PlanRow.id < before)
    with database.reading() as session:
        return [
            StoredPlan(
                id=row.id,
                plan=row.plan,
                hardware_id=row.hardware_id,
                created_at=row.created_at,
                code_version=row.code_version,
                num_runs=num_runs,
            )
            for row, num_runs in session.execute(query)
        ]
