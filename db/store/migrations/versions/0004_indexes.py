"""Indexes for lists of 100,000 runs, plans and fits of one hardware."""

from __future__ import annotations

from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    for table in ("runs", "plans", "fits"):
        op.create_index(op.f(f"ix_{table}_hardware_id_id"), table, ["hardware_id", "id"])
    op.create_index(op.f("ix_measurements_op_id"), "measurements", ["op", "id"])
