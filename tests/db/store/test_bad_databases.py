"""Databases that cannot serve: one line each, nothing lost, no traceback of a driver."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sqlite3
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from sqlalchemy import make_url

from db.errors import UserError
from db.rows.hardware import save_hardware
from db.rows.measurements import load_measurements, save_measurements
from db.store.engine import Database, open_database
from db.store.location import default_path, default_url
from tests.db.samples import make_hardware, make_measurement

NOBODY = 65534


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("profile.db", "must be a URL such as sqlite:///"),
        ("mysql://host/name", "must be a URL such as sqlite:///"),
        ("postgresql+nodriver://host/name", "must be a URL such as sqlite:///"),
        ("postgresql://host:port/name", "must be a URL such as sqlite:///"),
        ("postgresql:/user:secret@host/name", "must be a URL such as sqlite:///"),
        ("postgresql://user:secret@host:port/name", r"\*\*\*@host:port/name; must be a URL such as sqlite:///"),
        ("postgresql://user:secret/name", r"user:\*\*\*/name; must be a URL such as sqlite:///"),
        ("mysql://host/name?password=secret", "must be a URL such as sqlite:///"),
        ("sqlite:///{tmp}/missing/profile.db", "missing; must be an existing folder"),
        ("sqlite:///{tmp}", "must be a file"),
        ("sqlite:///{tmp}/text.db", "not a database; must be a SQLite file"),
        ("sqlite:///{tmp}/other.db", r"belongs to another program \(its tables: bookmarks\)"),
        ("postgresql://user:secret@127.0.0.1:1/name", r"server is unreachable .*[Cc]onnection refused"),
        ("postgresql://user@/name?host={tmp}", "server is unreachable .*No such file"),
    ],
)
@pytest.mark.parametrize("read_only", [False, True])
def test_urls(tmp_path: Path, url: str, message: str, read_only: bool) -> None:
    (tmp_path / "text.db").write_text("this is a text, not a database\n" * 100)
    with sqlite3.connect(tmp_path / "other.db") as other:
        other.execute("CREATE TABLE bookmarks (url TEXT)")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match=message) as caught:
        open_database(url.format(tmp=tmp_path), read_only=read_only)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_database_the_server_does_not_have(postgresql_url: str) -> None:
    with pytest.raises(UserError, match='database "isochunk_missing" does not exist'):
        open_database(make_url(postgresql_url).set(database="isochunk_missing").render_as_string(hide_password=False))


def test_a_server_that_stops_meanwhile(new_postgresql_url: str) -> None:
    end_others = (
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    with (
        open_database(new_postgresql_url) as database,
        open_database(new_postgresql_url) as other,
        pytest.raises(UserError, match=r"the server (stopped|is unreachable) \(.*\)"),
        database.session() as session,
    ):
        session.connection()
        with other.engine.connect() as connection:
            connection.exec_driver_sql(end_others)
        session.connection().exec_driver_sql("SELECT 1")


def test_nothing_there_to_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing there yet; `isochunk profile MODEL` creates"):
        open_database(f"sqlite:///{tmp_path / 'new.db'}", read_only=True)
    assert list(tmp_path.iterdir()) == []


class TestDefault:
    def test_is_a_file_in_the_data_folder_made_when_needed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("ISOCHUNK_DB", raising=False)
        monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        with open_database() as database:
            assert database.location == default_url() == f"sqlite:///{default_path()}"
        assert default_path().is_relative_to(tmp_path)
        assert default_path().is_file()

    def test_is_what_the_environment_says(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ISOCHUNK_DB", f"sqlite:///{tmp_path / 'mine.db'}")
        open_database().close()
        assert (tmp_path / "mine.db").is_file()

    def test_whose_folder_cannot_be_made(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "data").write_text("a file where the folder should be")
        monkeypatch.delenv("ISOCHUNK_DB", raising=False)
        monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
        monkeypatch.setenv("HOME", str(tmp_path / "data"))
        with pytest.raises(UserError, match=r"database folder: .*; cannot be created \(.+\)"):
            open_database()


@pytest.mark.parametrize("value", ["soon", "-1", "nan", "inf"])
def test_the_timeout_must_be_seconds(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISOCHUNK_DB_TIMEOUT_S", value)
    with pytest.raises(UserError, match=f"ISOCHUNK_DB_TIMEOUT_S: {value}; must be a number of seconds"):
        open_database("sqlite://")


def test_a_lock_while_it_is_created(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISOCHUNK_DB_TIMEOUT_S", "0.2")
    path = tmp_path / "profile.db"
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(UserError, match=r"profile\.db; locked by another process for 0\.2 s"):
        open_database(f"sqlite:///{path}")
    holder.close()
    open_database(f"sqlite:///{path}").close()


@pytest.mark.parametrize("kind", ["IMMEDIATE", "EXCLUSIVE"])
def test_a_lock_that_is_let_go_is_waited_for(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "profile.db"
    holder = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    holder.execute(f"BEGIN {kind}")
    let_go = threading.Timer(0.5, lambda: holder.execute("ROLLBACK"))
    let_go.start()
    with open_database(f"sqlite:///{path}", lock_timeout_s=30) as database:
        save_hardware(database, make_hardware())
    let_go.join()
    holder.close()


def test_a_full_disk_loses_nothing_that_was_written(tmp_path: Path) -> None:
    with open_database(f"sqlite:///{tmp_path / 'profile.db'}") as database:
        save_measurements(database, make_hardware(), [make_measurement()])
        _limit_pages(database, spare=8)
        rows = [make_measurement(m, variant="more") for m in range(2000)]
        with pytest.raises(UserError, match="no space left on its disk; nothing was written"):
            save_measurements(database, make_hardware(), rows)
        assert load_measurements(database, make_hardware()) == [make_measurement()]
        save_measurements(database, make_hardware(), rows[:3])
        assert len(load_measurements(database, make_hardware())) == 4


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    """A database file with 500 rows."""
    path = tmp_path / "profile.db"
    with open_database(f"sqlite:///{path}") as database:
        save_measurements(database, make_hardware(), [make_measurement(m) for m in range(500)])
    return path


@pytest.mark.parametrize("read_only", [False, True])
def test_a_file_with_bytes_overwritten_in_its_middle_is_not_opened(filled: Path, read_only: bool) -> None:
    data = bytearray(filled.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 20_000] = os.urandom(20_000)
    filled.write_bytes(data)
    with pytest.raises(UserError, match=r"damaged \(.*\); restore a copy, or save what can be read: sqlite3") as caught:
        open_database(f"sqlite:///{filled}", read_only=read_only)
    assert "\n" not in str(caught.value)
    assert filled.read_bytes() == data


def test_a_row_that_was_changed_from_outside_is_found_by_the_check_and_by_reading(filled: Path) -> None:
    with open_database(f"sqlite:///{filled}") as database:
        database.check()
    with sqlite3.connect(filled) as other:
        other.execute("UPDATE measurements SET shape = 'm=many' WHERE id = 17")
    with open_database(f"sqlite:///{filled}") as database:
        for read in (database.check, lambda: load_measurements(database, make_hardware())):
            with pytest.raises(UserError, match=r"a row cannot be read \(.*'many'\); restore a copy"):
                read()


def test_a_row_that_belongs_to_nothing_is_found_by_the_check(filled: Path) -> None:
    with sqlite3.connect(filled) as other:
        other.execute("DELETE FROM hardware")
    with (
        open_database(f"sqlite:///{filled}") as database,
        pytest.raises(UserError, match="a row of measurements belongs to nothing"),
    ):
        database.check()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
def test_a_full_file_system_says_so(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], check=True, timeout=30)
    try:
        url = f"sqlite:///{tmp_path / 'profile.db'}"
        open_database(url).close()
        (tmp_path / "filler").write_bytes(bytes(shutil.disk_usage(tmp_path).free))
        said = r"no space left on its disk; nothing was written \(some 8 MiB must be free"
        with pytest.raises(UserError, match=said), open_database(url) as database:
            save_measurements(database, make_hardware(), [make_measurement(m) for m in range(500)])
        (tmp_path / "filler").unlink()
        with open_database(url) as database:
            save_measurements(database, make_hardware(), [make_measurement(m) for m in range(500)])
            database.check()
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True, timeout=30)


class TestReadOnlyFiles:
    """As a user without the right to write: root, whom permissions do not stop, first becomes nobody."""

    @pytest.fixture
    def folder(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory() as name:  # pytest's own is closed to other users
            folder = Path(name)
            with open_database(f"sqlite:///{folder / 'profile.db'}") as database:
                save_measurements(database, make_hardware(), [make_measurement()])
            (folder / "profile.db").chmod(0o666)
            folder.chmod(0o777)
            yield folder
            folder.chmod(0o700)

    def test_file(self, folder: Path) -> None:
        (folder / "profile.db").chmod(0o444)
        assert _as_nobody(_write, folder).endswith("profile.db; read-only; must be writable")
        assert _as_nobody(_read, folder) == "1 rows"

    def test_folder(self, folder: Path) -> None:
        folder.chmod(0o555)
        assert _as_nobody(_write, folder) == f"database folder: {folder}; read-only; must be writable"
        assert _as_nobody(_read, folder) == "1 rows"

    def test_folder_of_a_new_file(self, folder: Path) -> None:
        (folder / "profile.db").unlink()
        folder.chmod(0o555)
        assert _as_nobody(_write, folder) == f"database folder: {folder}; read-only; must be writable"

    def test_unreadable_file(self, folder: Path) -> None:
        (folder / "profile.db").chmod(0o000)
        assert _as_nobody(_read, folder).endswith("profile.db; must be readable")


def _limit_pages(database: Database, *, spare: int) -> None:
    """From now on the file may grow by so many pages: SQLite then says what it says on a full disk."""
    from sqlalchemy import event

    def limit(connection: sqlite3.Connection, _record: object) -> None:
        (used,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {limits.setdefault('pages', used + spare)}")

    limits: dict[str, int] = {}
    event.listen(database.engine, "connect", limit)


def _write(folder: Path) -> str:
    with open_database(f"sqlite:///{folder / 'profile.db'}") as database:
        save_hardware(database, make_hardware(device="another"))
    return "written"


def _read(folder: Path) -> str:
    with open_database(f"sqlite:///{folder / 'profile.db'}", read_only=True) as database:
        return f"{len(load_measurements(database, make_hardware()))} rows"


def _as_nobody(action: Callable[[Path], str], folder: Path) -> str:
    """What an action says, or its UserError, in a process without root's rights."""
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe(duplex=False)
    process = fork.Process(target=_report, args=(action, folder, there))
    process.start()
    said = here.recv() if here.poll(60) else "said nothing"
    process.join(30)
    assert isinstance(said, str)
    return said


def _report(action: Callable[[Path], str], folder: Path, there: Connection) -> None:
    if os.geteuid() == 0:
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    try:
        there.send(action(folder))
    except UserError as error:
        there.send(str(error))
    except BaseException as error:
        there.send(f"{type(error).__name__}: {error}")
        raise
