"""Runs the steps on the connection, and inside the transaction, that `db.store.schema.upgrade` holds."""

from __future__ import annotations

from alembic import context

from db.store.schema import VERSION_TABLE
from db.store.tables import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    version_table=VERSION_TABLE,
    render_as_batch=True,  # SQLite cannot alter a column in place
)
with context.begin_transaction():
    context.run_migrations()
