"""Upgrades: the steps lead to the models, keep every row, and happen whole or not at all."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import inspect, text

from db.errors import UserError
from db.rows.measurements import load_measurements, save_measurements
from db.store import engine, schema
from db.store.engine import Database, open_database
from db.store.tables import Base
from tests.db.samples import make_hardware, make_measurement

# Rebuilds the table that measurements point to: the step that loses rows where SQLite's foreign keys stay on.
NEXT_REVISION = """
import sqlalchemy as sa
from alembic import op

revision = "9999"
down_revision = "HEAD"


def upgrade() -> None:
    with op.batch_alter_table("hardware", recreate="auto") as batch:
        batch.alter_column("link", existing_type=sa.String(), nullable=True)
        batch.add_column(sa.Column("rack", sa.String(), nullable=False, server_default="unknown"))
    if FAILS:
        op.execute("INSERT INTO no_such_table VALUES (1)")
"""


def test_migrations_and_models_agree(database: Database) -> None:
    with database.engine.connect() as connection:
        options = {"compare_type": True, "version_table": schema.VERSION_TABLE}
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, Base.metadata) == []


def test_the_revisions_known_in_code_are_those_in_the_folder() -> None:
    config = Config()
    config.set_main_option("script_location", str(schema.MIGRATIONS))
    steps = list(ScriptDirectory.from_config(config).walk_revisions())
    assert tuple(step.revision for step in reversed(steps)) == schema.REVISIONS


@pytest.mark.parametrize("fails", [False, True])
def test_an_older_database_is_upgraded_whole_or_not_at_all(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    current = schema.HEAD
    with open_database(database_url) as old:
        save_measurements(old, make_hardware(), [make_measurement(8), make_measurement(64)])
    migrations = tmp_path / "migrations"
    shutil.copytree(schema.MIGRATIONS, migrations)
    (migrations / "versions" / "9999_next.py").write_text(
        NEXT_REVISION.replace("FAILS", str(fails)).replace("HEAD", schema.HEAD)
    )
    with monkeypatch.context() as newer_code:
        newer_code.setattr(schema, "MIGRATIONS", migrations)
        newer_code.setattr(schema, "REVISIONS", (*schema.REVISIONS, "9999"))
        newer_code.setattr(schema, "HEAD", "9999")
        newer_code.setattr(engine, "HEAD", "9999")
        with pytest.raises(
            UserError, match=f"has schema {current}, this version reads 9999; run `isochunk db upgrade`"
        ):
            open_database(database_url, read_only=True)
        if fails:
            with pytest.raises(Exception, match="no_such_table"):
                open_database(database_url)
        else:
            with open_database(database_url) as upgraded:
                assert upgraded.found_revision == current
                assert load_measurements(upgraded, make_hardware()) == [make_measurement(8), make_measurement(64)]
                with upgraded.engine.connect() as connection:
                    assert connection.scalar(text("SELECT rack FROM hardware")) == "unknown"
                    assert schema.stored_revision(connection) == "9999"
    if fails:
        with open_database(database_url) as untouched:
            assert untouched.found_revision == current
            assert load_measurements(untouched, make_hardware()) == [make_measurement(8), make_measurement(64)]
            columns = {column["name"] for column in inspect(untouched.engine).get_columns("hardware")}
            assert "rack" not in columns
    else:
        with pytest.raises(UserError, match="has schema 9999 of a newer version"):
            open_database(database_url)


def test_opening_a_current_database_does_not_import_alembic(database_url: str) -> None:
    open_database(database_url).close()
    opening = "from db.store.engine import open_database; open_database(sys.argv[1])"
    code = f"import sys; {opening}; print('alembic' in sys.modules)"
    command = [sys.executable, "-c", code, database_url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"
