"""Measured points: the time of one operation of one shape on one hardware, its spread and its origin."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import select
from sqlalchemy.orm import Session

from db.errors import cut
from db.rows.hardware import Hardware, hardware_id, id_of
from db.store.columns import shape_text
from db.store.engine import Database
from db.store.tables import MeasurementRow, Source
from db.store.upsert import insert_or_replace

__all__ = ["Measurement", "MeasurementKey", "Source", "load_measurements",
           "measurement_key", "page_measurements", "save_measurements"]  # fmt: skip


class MeasurementKey(NamedTuple):
    """What was measured. A hardware keeps one measurement of each key, the newest."""

    op: str
    dtype: str
    shape: str  # canonical text, e.g. "k=4096,m=512"
    group_size: int
    busy_ranks: int
    variant: str


def measurement_key(
    *, op: str, dtype: str, shape: Mapping[str, int], group_size: int = 1, busy_ranks: int = 1, variant: str = ""
) -> MeasurementKey:
    """The key of a point that need not be measured yet. Raises ValueError for a shape name that cannot be kept."""
    return MeasurementKey(op, dtype, shape_text(shape), group_size, busy_ranks, variant)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One point: times in microseconds over `num_samples` repetitions.

    Raises ValueError for negative or infinite times, and for quantiles that are out of order.
    """

    op: str
    dtype: str
    shape: Mapping[str, int]
    group_size: int = 1  # ranks that take part together
    busy_ranks: int = 1  # ranks of the machine at work meanwhile, these included
    variant: str = ""
    num_samples: int
    median_us: float
    p10_us: float
    p90_us: float
    min_us: float
    std_us: float
    noisy: bool
    measured_at: datetime
    code_version: str
    source: Source = Source.PROFILE

    def __post_init__(self) -> None:
        shape_text(self.shape)
        times = (self.min_us, self.p10_us, self.median_us, self.p90_us)
        if not all(math.isfinite(time) and time >= 0 for time in (*times, self.std_us)):
            raise ValueError(f"times must be finite and not negative: {times}, std_us {self.std_us}")
        for name in ("num_samples", "group_size", "busy_ranks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {cut(getattr(self, name))} and must be 1 or more")
        if list(times) != sorted(times):
            raise ValueError(f"min_us <= p10_us <= median_us <= p90_us must hold: {times}")
        if self.measured_at.tzinfo is None:
            raise ValueError(f"measured_at is {self.measured_at} and must have a time zone")

    @property
    def key(self) -> MeasurementKey:
        """What was measured."""
        return MeasurementKey(
            self.op, self.dtype, shape_text(self.shape), self.group_size, self.busy_ranks, self.variant
        )


def save_measurements(database: Database, hardware: Hardware, rows: Iterable[Measurement]) -> None:
    """Keep the rows, all or none; each replaces the row of its key unless that one is newer.

    Several processes may save at once.
    """
    with database.session() as session:
        write_measurements(session, hardware_id(session, hardware), rows)


def write_measurements(session: Session, hardware_id: int, rows: Iterable[Measurement]) -> None:
    """Keep the rows within a transaction."""
    newest = {row.key: row for row in sorted(rows, key=lambda row: row.measured_at)}
    values = [_values(newest[key]) | {"hardware_id": hardware_id} for key in sorted(newest)]
    unique = ["hardware_id", *MeasurementKey._fields]
    insert_or_replace(session, MeasurementRow, values, unique=unique, newest_by="measured_at")


def load_measurements(
    database: Database,
    hardware: Hardware,
    *,
    op: str | None = None,
    dtype: str | None = None,
    group_size: int | None = None,
    busy_ranks: int | None = None,
    variant: str | None = None,
) -> list[Measurement]:
    """The rows of a hardware by operation, dtype, variant, ranks and shape, only those that have each value given."""
    wanted = {"op": op, "dtype": dtype, "group_size": group_size, "busy_ranks": busy_ranks, "variant": variant}
    query = (
        select(MeasurementRow)
        .where(MeasurementRow.hardware_id == id_of(hardware))
        .where(*(getattr(MeasurementRow, name) == value for name, value in wanted.items() if value is not None))
    )
    with database.reading() as session:
        return sorted((from_row(row) for row in session.scalars(query).all()), key=_order)


def measured_dtypes(database: Database, hardware: Hardware) -> set[str]:
    """The dtypes of a hardware's rows."""
    query = select(MeasurementRow.dtype).where(MeasurementRow.hardware_id == id_of(hardware)).distinct()
    with database.reading() as session:
        return set(session.scalars(query))


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredMeasurement:
    """A stored point with its id and its hardware's id."""

    id: int
    hardware_id: int
    measurement: Measurement


def page_measurements(
    database: Database,
    *,
    hardware_id: int | None = None,
    op: str | None = None,
    before: int | None = None,
    limit: int,
) -> list[StoredMeasurement]:
    """Points, the last kept first: only those of a hardware, of an operation, or kept before the point of an id."""
    query = select(MeasurementRow).order_by(MeasurementRow.id.desc()).limit(limit)
    if hardware_id is not None:
        query = query.where(MeasurementRow.hardware_id == hardware_id)
    if op is not None:
        query = query.where(MeasurementRow.op == op)
    if before is not None:
        query = query.where(MeasurementRow.id < before)
    with database.reading() as session:
        rows = session.scalars(query).all()
    return [StoredMeasurement(id=row.id, hardware_id=row.hardware_id, measurement=from_row(row)) for row in rows]


def _order(row: Measurement) -> tuple[object, ...]:
    return row.op, row.dtype, row.variant, row.group_size, row.busy_ranks, sorted(row.shape.items())


def _values(row: Measurement) -> dict[str, object]:
    return {name: getattr(row, name) for name in Measurement.__dataclass_fields__}


def from_row(row: MeasurementRow) -> Measurement:
    """The measurement a row of the table holds."""
    return Measurement(**{name: getattr(row, name) for name in Measurement.__dataclass_fields__})
