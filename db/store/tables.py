"""The tables: hardware, its measurements, plans, runs with the time of each round, and fitted cost models."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import JSON, BigInteger, ForeignKey, Index, MetaData, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from db.store.columns import ShapeText, UtcDateTime, word_column


class Source(StrEnum):
    """Where a measurement came from."""

    PROFILE = "profile"  # measured on this machine
    IMPORT = "import"  # read from another machine's export


class RunKind(StrEnum):
    """Why a plan was run."""

    RUN_PLAN = "run-plan"
    TUNE_TRIAL = "tune-trial"
    BENCHMARK = "benchmark"
    ENGINE = "engine"
    """By another engine: only its requests' times are known."""


class RunStatus(StrEnum):
    """State of a run or a process."""

    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    LOST = "lost"  # its process died


class Base(DeclarativeBase):
    """Names every constraint, so that migrations can find it again on any database."""

    metadata = MetaData(
        naming_convention={
            "pk": "pk_%(table_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012 - SQLAlchemy reads it as a plain class attribute
        datetime: UtcDateTime,
        Mapping[str, int]: ShapeText,
        dict[str, Any]: JSON,
        list[float]: JSON(none_as_null=True),
        Source: word_column(Source),
        RunKind: word_column(RunKind),
        RunStatus: word_column(RunStatus),
    }


class HardwareRow(Base):
    """One machine configuration as `db.rows.hardware.Hardware` describes it."""

    __tablename__ = "hardware"

    id: Mapped[int] = mapped_column(primary_key=True)
    fingerprint: Mapped[str] = mapped_column(unique=True)
    device: Mapped[str]
    device_count: Mapped[int]
    memory_bytes: Mapped[int] = mapped_column(BigInteger)
    driver: Mapped[str]
    torch_version: Mapped[str]
    backend: Mapped[str]
    num_threads: Mapped[int]
    link: Mapped[str]
    created_at: Mapped[datetime]
    code_version: Mapped[str]


class MeasurementRow(Base):
    """One measured point, the newest of its key on its hardware."""

    __tablename__ = "measurements"
    __table_args__ = (
        UniqueConstraint("hardware_id", "op", "dtype", "shape", "group_size", "busy_ranks", "variant"),
        Index(None, "hardware_id", "measured_at"),  # how many a hardware has, and since when
        Index(None, "hardware_id", "id"),  # pages of one hardware
        Index(None, "hardware_id", "op", "id"),  # and of one operation
        Index(None, "op", "id"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    hardware_id: Mapped[int] = mapped_column(ForeignKey("hardware.id", ondelete="CASCADE"))
    op: Mapped[str]
    dtype: Mapped[str]
    shape: Mapped[Mapping[str, int]]
    group_size: Mapped[int]
    busy_ranks: Mapped[int]
    variant: Mapped[str]
    num_samples: Mapped[int]
    median_us: Mapped[float]
    p10_us: Mapped[float]
    p90_us: Mapped[float]
    min_us: Mapped[float]
    std_us: Mapped[float]
    noisy: Mapped[bool]
    measured_at: Mapped[datetime]
    code_version: Mapped[str]
    source: Mapped[Source]


class PlanRow(Base):
    """One plan file, kept once however often it is saved."""

    __tablename__ = "plans"
    __table_args__ = (Index(None, "hardware_id", "id"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    content_hash: Mapped[str] = mapped_column(unique=True)
    plan: Mapped[dict[str, Any]]
    hardware_id: Mapped[int | None] = mapped_column(ForeignKey("hardware.id", ondelete="SET NULL"))
    created_at: Mapped[datetime]
    code_version: Mapped[str]


class ProcessRow(Base):
    """One long-running command that uses the database; it holds the lease of its id meanwhile."""

    __tablename__ = "processes"
    __table_args__ = (Index(None, "status"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    command: Mapped[str]
    host: Mapped[str]
    pid: Mapped[int]
    status: Mapped[RunStatus]
    started_at: Mapped[datetime]
    finished_at: Mapped[datetime | None]
    error: Mapped[str | None]
    code_version: Mapped[str]


class WorkerRow(Base):
    """The hardware of a process that takes jobs."""

    __tablename__ = "workers"

    process_id: Mapped[int] = mapped_column(ForeignKey("processes.id", ondelete="CASCADE"), primary_key=True)
    machine: Mapped[str]
    device_type: Mapped[str]
    device: Mapped[str]
    device_count: Mapped[int]
    memory_bytes: Mapped[int] = mapped_column(BigInteger)


class TokenRow(Base):
    """An access token of the service: its hash and its scopes."""

    __tablename__ = "tokens"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    hash: Mapped[str] = mapped_column(unique=True)
    scopes: Mapped[str]
    created_at: Mapped[datetime]
    revoked_at: Mapped[datetime | None]


class JobEndRow(Base):
    """How a job of the service ended: no job has two rows."""

    __tablename__ = "job_ends"

    job: Mapped[str] = mapped_column(primary_key=True)
    exit_code: Mapped[int]
    error: Mapped[str | None]
    result: Mapped[Any] = mapped_column(JSON(none_as_null=True), nullable=True)
    ended_at: Mapped[datetime]
    code_version: Mapped[str]


class RunRow(Base):
    """One execution of a plan: measured and predicted results."""

    __tablename__ = "runs"
    __table_args__ = (Index(None, "plan_id"), Index(None, "study"), Index(None, "hardware_id", "id"))

    id: Mapped[int] = mapped_column(primary_key=True)
    plan_id: Mapped[int] = mapped_column(ForeignKey("plans.id", ondelete="CASCADE"))
    hardware_id: Mapped[int] = mapped_column(ForeignKey("hardware.id", ondelete="CASCADE"))
    process_id: Mapped[int | None] = mapped_column(ForeignKey("processes.id", ondelete="SET NULL"))
    kind: Mapped[RunKind]
    status: Mapped[RunStatus]
    study: Mapped[str | None]
    details: Mapped[dict[str, Any]]
    started_at: Mapped[datetime]
    finished_at: Mapped[datetime | None]
    makespan_s: Mapped[float | None]
    predicted_makespan_s: Mapped[float | None]
    slowdown: Mapped[float | None]
    mfu: Mapped[float | None]
    ttft_s: Mapped[list[float] | None]
    error: Mapped[str | None]
    failed_rank: Mapped[int | None]
    failed_stage: Mapped[int | None]
    failed_round: Mapped[int | None]
    code_version: Mapped[str]


class RoundTimeRow(Base):
    """When one round ran on one stage, or in one group of its layers where it holds several, in seconds from the start
    of the run.
    """

    __tablename__ = "round_times"

    run_id: Mapped[int] = mapped_column(ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True)
    round: Mapped[int] = mapped_column(primary_key=True)
    stage: Mapped[int] = mapped_column(primary_key=True)
    predicted_s: Mapped[float | None]
    start_s: Mapped[float]
    finish_s: Mapped[float]


class FitRow(Base):
    """One cost model fitted to the measurements, with the report of how well it predicts."""

    __tablename__ = "fits"
    __table_args__ = (Index(None, "hardware_id", "model_name", "dtype"), Index(None, "hardware_id", "id"))

    id: Mapped[int] = mapped_column(primary_key=True)
    hardware_id: Mapped[int] = mapped_column(ForeignKey("hardware.id", ondelete="CASCADE"))
    model_name: Mapped[str]
    dtype: Mapped[str]
    cost_model: Mapped[dict[str, Any]]
    report: Mapped[dict[str, Any]]
    created_at: Mapped[datetime]
    code_version: Mapped[str]
