"""Cost models fitted to a hardware's measurements, each with the report of how well it predicts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import select

from db.rows.hardware import Hardware, hardware_id, id_of
from db.store.engine import Database
from db.store.provenance import code_version, now
from db.store.tables import FitRow


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFit:
    """One fitted cost model."""

    id: int
    hardware_id: int
    model_name: str
    dtype: str
    cost_model: dict[str, Any]
    report: dict[str, Any]
    created_at: datetime
    code_version: str


def save_fit(
    database: Database,
    hardware: Hardware,
    model_name: str,
    dtype: str,
    cost_model: Mapping[str, Any],
    report: Mapping[str, Any],
) -> int:
    """Keep a fitted cost model and its report, both as JSON; return its id."""
    with database.session() as session:
        row = FitRow(
            hardware_id=hardware_id(session, hardware),
            model_name=model_name,
            dtype=dtype,
            cost_model=dict(cost_model),
            report=dict(report),
            created_at=now(),
            code_version=code_version(),
        )
        session.add(row)
        session.flush()
        return row.id


def list_fits(
    database: Database,
    *,
    hardware: Hardware | None = None,
    model_name: str | None = None,
    dtype: str | None = None,
    limit: int | None = None,
    before: int | None = None,
) -> list[StoredFit]:
    """Fits, newest first, only those that have each value given, or that were kept before the fit of an id."""
    query = select(FitRow).order_by(FitRow.id.desc()).limit(limit)
    if hardware is not None:
        query = query.where(FitRow.hardware_id == id_of(hardware))
    if before is not None:
        query = query.where(FitRow.id < before)
    wanted = {"model_name": model_name, "dtype": dtype}
    for name, value in wanted.items():
        if value is not None:
            query = query.where(getattr(FitRow, name) == value)
    with database.reading() as session:
        rows = session.scalars(query).all()
    return [StoredFit(**{name: getattr(row, name) for name in StoredFit.__dataclass_fields__}) for row in rows]
