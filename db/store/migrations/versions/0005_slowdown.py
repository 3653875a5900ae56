"""How much slower the machine was during a run than in its profile."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.add_column("runs", sa.Column("slowdown", sa.Double(), nullable=True))
