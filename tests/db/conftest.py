"""Every test that takes `database_url` or `database` runs on SQLite and on a real PostgreSQL server."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, make_url, text

from db.store.engine import Database, open_database
from tests.db.postgresql import find_binaries, running_server


@pytest.fixture(scope="session")
def postgresql_url() -> Iterator[str]:
    """A server's URL: `ISOCHUNK_TEST_POSTGRESQL`, else a server started for these tests."""
    given = os.environ.get("ISOCHUNK_TEST_POSTGRESQL")
    if given:
        yield given
        return
    binaries = find_binaries()
    if binaries is None:
        reason = "no PostgreSQL server: install Debian's postgresql or set ISOCHUNK_TEST_POSTGRESQL"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    with running_server(binaries) as url:
        yield url


@pytest.fixture
def new_postgresql_url(postgresql_url: str) -> Iterator[str]:
    """An empty database on the server, dropped after the test."""
    name = f"isochunk_test_{uuid.uuid4().hex[:12]}"
    server = create_engine(postgresql_url, isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    yield make_url(postgresql_url).set(database=name).render_as_string(hide_password=False)
    with server.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    server.dispose()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a database that does not exist yet (SQLite) or is empty (PostgreSQL)."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'profile.db'}"
    return str(request.getfixturevalue("new_postgresql_url"))


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """An open, empty database that gives up on locks soon."""
    with open_database(database_url, lock_timeout_s=10) as opened:
        yield opened
